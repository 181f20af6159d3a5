"""`requirements.txt` of an exported repo: in it and in its card, among its files, and kept with what a person
added."""

import pytest

from dylora_moe.hub_export import export, make_variant, verify
from dylora_moe.hub_export.repo.checksums import read_checksums
from dylora_moe.hub_export.repo.repo_files import repo_files
from dylora_moe.modeling.configuration_dylora_moe import REQUIRED_TRANSFORMERS
from dylora_moe.modeling.saving_dylora_moe import REQUIREMENTS


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_a_repo_says_which_transformers_it_needs(layout, checkpoint, tmp_path):
    repo = export(checkpoint, tmp_path / "repo", layout=layout, verify=False).output_dir
    assert (repo / "requirements.txt").read_text().splitlines() == list(REQUIREMENTS)
    card = (repo / "README.md").read_text()
    assert f"transformers\n{REQUIRED_TRANSFORMERS} or later" in card
    assert f'pip install --upgrade "transformers>={REQUIRED_TRANSFORMERS}"' in card
    content = repo_files(repo)  # what push and mirror send
    assert "requirements.txt" in content.files and not content.left_out
    assert "requirements.txt" in read_checksums(repo)
    variant = make_variant(repo, routing_strategy="base", output_dir=tmp_path / "variant").output_dir
    assert (variant / "requirements.txt").read_bytes() == (repo / "requirements.txt").read_bytes()


def test_what_a_person_added_survives_another_export(checkpoint, tmp_path):
    repo = export(checkpoint, tmp_path / "repo", verify=False).output_dir
    text = (repo / "requirements.txt").read_text()
    (repo / "requirements.txt").write_text(text + "fastapi\n")
    export(checkpoint, repo, overwrite=True, verify=False)
    assert (repo / "requirements.txt").read_text() == text + "fastapi\n"
    assert verify(repo).passed
