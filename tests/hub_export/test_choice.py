"""Which of several checkpoints in one folder is read, and that a choice never leaves the folder."""

import shutil

import pytest
from helpers_checkpoints import change_json, save_adapter, save_final_checkpoint, save_router, write_json

from dylora_moe.hub_export import InputError
from dylora_moe.hub_export.readers.choice import choose_checkpoint
from dylora_moe.hub_export.sources.source_folder import open_folder


@pytest.fixture(scope="session")
def small(tmp_path_factory, foundation):
    return save_final_checkpoint(
        tmp_path_factory.mktemp("choice") / "final", foundation, num_experts=1, rank=1
    )


@pytest.fixture
def run(small, tmp_path):
    """A run's folder with three checkpoints, of which the one with the highest step is not the last by its
    letters."""
    for step in (20, 9, 100):
        shutil.copytree(small, tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "logs").mkdir()
    return tmp_path / "run"


def choose_folder(run, subfolder):
    found = choose_checkpoint(open_folder(run), subfolder)
    return found.folder.path, found.note


def chosen(run, subfolder=None) -> str:
    folder, why = choose_folder(run, subfolder)
    assert folder.parent == run and why is not None and "\n" not in why
    assert f"reading {folder.name}:" in why
    return f"{folder.name}:{why.split(f'reading {folder.name}:')[1]}"


def choice_error(run, subfolder=None) -> str:
    with pytest.raises(InputError) as caught:
        choose_folder(run, subfolder)
    return str(caught.value)


def test_the_best_model_wins(run, small):
    write_json(run / "trainer_state.json", {"best_model_checkpoint": "checkpoint-9"})
    shutil.copytree(small, run / "best_model")
    assert chosen(run).startswith(
        "best_model: the run's best model; also there: checkpoint-100, checkpoint-20"
    )


@pytest.mark.parametrize("place", [".", "checkpoint-100"])
@pytest.mark.parametrize(
    "path", ["/somewhere/else/out/checkpoint-9", "C:\\runs\\checkpoint-9", "checkpoint-9/"]
)
def test_then_what_the_trainer_calls_the_best(run, place, path):
    write_json(run / place / "trainer_state.json", {"best_model_checkpoint": path, "global_step": 100})
    text = chosen(run)
    assert text.startswith("checkpoint-9: ") and "trainer_state.json names it as the best" in text


def test_the_state_of_an_older_checkpoint_does_not_count(run):
    write_json(run / "checkpoint-20" / "trainer_state.json", {"best_model_checkpoint": "out/checkpoint-9"})
    assert chosen(run).startswith("checkpoint-100: the highest step")


@pytest.mark.parametrize("best", [None, 9, ["checkpoint-9"], "", "/"])
def test_then_the_highest_step(run, best):
    write_json(run / "trainer_state.json", {"best_model_checkpoint": best})
    assert chosen(run).startswith("checkpoint-100: the highest step; also there: checkpoint-20, checkpoint-9")


@pytest.mark.parametrize("best", ["/gone/checkpoint-7", "../../etc", ".."])
def test_a_best_that_is_not_there_is_told(run, best):
    write_json(run / "trainer_state.json", {"best_model_checkpoint": best})
    text = chosen(run)
    assert text.startswith("checkpoint-100: the highest step") and "which is not there" in text


def test_a_single_checkpoint_needs_no_best(run):
    shutil.rmtree(run / "checkpoint-20")
    shutil.rmtree(run / "checkpoint-9")
    assert chosen(run) == "checkpoint-100: the only checkpoint"


def test_folders_of_no_known_format_are_passed_over(run):
    (run / "best_model").mkdir()
    shutil.rmtree(run / "checkpoint-100" / "peft_adapters")
    shutil.rmtree(run / "checkpoint-100" / "dylo_moe_state")
    assert chosen(run).startswith("checkpoint-20: the highest step")


def test_a_damaged_best_model_is_still_the_best(run, small):
    """Taking another without a word would give somebody the wrong experts; reading it says what is wrong."""
    shutil.copytree(small, run / "best_model")
    (run / "best_model" / "peft_adapters" / "expert_0.pt").write_bytes(b"damaged")
    assert chosen(run).startswith("best_model: ")


def test_a_folder_of_a_known_format_is_taken_as_it_is(run, small):
    shutil.copytree(small, run, dirs_exist_ok=True)
    assert choose_folder(run, None) == (run, None)


def test_the_state_that_lies_beside_the_checkpoints_makes_no_checkpoint(run):
    (run / "dylo_moe_state").mkdir()
    save_router(run, 1)
    assert chosen(run).startswith("checkpoint-100: ")


def test_a_run_of_peft_adapters(foundation, tmp_path):
    for step in (5, 10):
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", foundation)
    assert chosen(tmp_path / "run").startswith("checkpoint-10: ")
    named = save_adapter(tmp_path / "run" / "named", foundation)
    assert choose_folder(named.parent, None) == (named.parent, None)


def test_nothing_to_choose_from_is_left_to_the_reader(tmp_path):
    (tmp_path / "empty").mkdir()
    assert choose_folder(tmp_path / "empty", None) == (tmp_path / "empty", None)
    with pytest.raises(InputError, match="missing does not exist"):
        choose_folder(tmp_path / "missing", None)


def test_a_damaged_file_on_top_is_an_error_and_not_passed_over(run):
    (run / "model.safetensors").write_bytes(b"damaged")
    change_json(run / "checkpoint-9" / "config.json", model_type="dylora-moe")
    write_json(run / "config.json", {"model_type": "llama"})
    assert "model.safetensors" in choice_error(run)


def test_a_damaged_trainer_state_is_an_error(run):
    (run / "trainer_state.json").write_text("{")
    assert "trainer_state.json" in choice_error(run)


def test_a_subfolder_is_the_users_own_choice(run, small):
    shutil.copytree(small, run / "best_model")
    assert choose_folder(run, "checkpoint-9") == (run / "checkpoint-9", None)
    shutil.copytree(small, run / "logs" / "deep")
    assert choose_folder(run, "logs/deep") == (run / "logs" / "deep", None)


@pytest.mark.parametrize(
    "subfolder", ["..", "../run/checkpoint-9", "checkpoint-9/../..", "/", "", "link", "a\0b"]
)
def test_a_subfolder_does_not_leave_the_folder(run, small, subfolder):
    (run / "link").symlink_to(small)
    assert "leads out of" in choice_error(run, subfolder)


def test_an_absolute_path_to_a_checkpoint_is_no_subfolder(run):
    assert "leads out of" in choice_error(run, str(run / "checkpoint-9"))


@pytest.mark.parametrize("subfolder", ["checkpoint-8", "checkpoint-9/config.json"])
def test_a_subfolder_that_is_not_there_says_what_is(run, subfolder):
    assert "there is checkpoint-100, checkpoint-20, checkpoint-9, logs" in choice_error(run, subfolder)


def test_a_checkpoint_that_is_a_link_inside_the_run_is_followed(run):
    (run / "best_model").symlink_to("checkpoint-9")
    assert chosen(run).startswith("best_model: ")


def test_a_checkpoint_that_is_a_link_elsewhere_is_refused(run, small):
    (run / "best_model").symlink_to(small)
    assert "best_model leads out of" in choice_error(run)
