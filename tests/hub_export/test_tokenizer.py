"""A repo's tokenizer gives the ids that stock transformers gives for the source's tokenizer beside its
foundation."""

import json
import shutil
import sys
import warnings

import pytest
from helpers_checkpoints import change_json, save_adapter, save_final_checkpoint, save_foundation
from helpers_slow import slow_but
from helpers_tokenizers import byte_level, remove_tokenizer, sentencepiece_kind, write_tokenizer_files
from huggingface_hub import constants
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.hub_export import DyloraMoeWarning, InputError, export, make_variant, merge, verify
from dylora_moe.hub_export.repo.repo_files import is_tokenizer_file
from dylora_moe.hub_export.tensors.mixture import FoundationReference
from dylora_moe.hub_export.tokenizers import tokenizer_files
from dylora_moe.hub_export.tokenizers.tokenizer import foundations_tokenizer, open_tokenizer, write_tokenizer
from dylora_moe.hub_export.tokenizers.tokenizer_comparison import TEXTS, behaviour, differences
from dylora_moe.hub_export.tokenizers.tokenizer_files import load_tokenizer
from dylora_moe.hub_export.tokenizers.tokenizer_trial import TrialError
from dylora_moe.modeling import DyloraMoeConfig
from dylora_moe.modeling.saving_dylora_moe import AUTO_MAP


SAMPLES = [*TEXTS, "<s>[INST] hi [/INST]", "for i in range(1000):", "x </s> y"]
END = {"eos_token": "</s>", "unk_token": "<unk>"}
ROWS = 512


def stock_ids(folder):
    """What a user of stock transformers gets; nobody is there to be asked about the repo's code."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return [tokenizer(text)["input_ids"] for text in SAMPLES]


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    """A foundation that transformers reads by tokenizer.json as it stands, though its files declare GPT-2's
    class."""
    folder = tmp_path_factory.mktemp("granite") / "base"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    GraniteForCausalLM(GraniteConfig(vocab_size=ROWS, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    return write_tokenizer_files(folder, byte_level(), tokenizer_class="GPT2TokenizerFast", **END)


@pytest.fixture(scope="module")
def granite_adapter(granite, tmp_path_factory):
    """An adapter with the foundation's two files, as training saves them beside it."""
    folder = save_adapter(tmp_path_factory.mktemp("adapters") / "one", granite)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(granite / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def llama_kind(tmp_path_factory):
    """A foundation with a tokenizer of Llama 2's kind, whose class is LlamaTokenizer and says nothing about
    `legacy`."""
    folder = save_foundation(tmp_path_factory.mktemp("llama") / "base", vocab_size=ROWS)
    remove_tokenizer(folder)
    write_tokenizer_files(
        folder, sentencepiece_kind(), tokenizer_class="LlamaTokenizer", bos_token="<s>", **END
    )
    change_json(folder / "tokenizer_config.json", legacy=True, add_bos_token=True, add_eos_token=False)
    return folder


def test_the_foundations_config_decides_not_the_declared_class(granite):
    declared = open_tokenizer("x", granite, None, None).tokenizer
    beside = AutoTokenizer.from_pretrained(granite)
    assert len(declared(SAMPLES[3])["input_ids"]) != len(beside(SAMPLES[3])["input_ids"])


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_an_adapters_tokenizer_gives_the_foundations_ids(granite, granite_adapter, layout, tmp_path):
    export(granite_adapter, tmp_path / "repo", layout=layout, verify=False)
    assert stock_ids(tmp_path / "repo") == stock_ids(granite)
    assert (tmp_path / "repo" / "tokenizer.json").read_bytes() == (granite / "tokenizer.json").read_bytes()
    assert {entry.what: entry.passed for entry in verify(tmp_path / "repo").findings}["tokenizer"] is True


def test_what_is_made_of_a_repo_gives_the_same_ids(granite, granite_adapter, tmp_path):
    export(granite_adapter, tmp_path / "repo", verify=False)
    make_variant(tmp_path / "repo", routing_strategy="base", output_dir=tmp_path / "variant")
    merge(tmp_path / "repo", expert=0, output_dir=tmp_path / "merged")
    export(tmp_path / "repo", tmp_path / "again", layout="adapter", verify=False)
    for name in ("variant", "merged", "again"):
        assert stock_ids(tmp_path / name) == stock_ids(granite), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_the_export_that_peft_moe_makes_gives_the_same_ids(granite, granite_adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "cache"))
    found = find_model(str(granite_adapter), backend="peft_moe")
    assert stock_ids(found.folder) == stock_ids(granite)


@pytest.mark.parametrize("kind", ["adapter", "final checkpoint"])
def test_a_blank_before_every_piece_stays_one(llama_kind, kind, tmp_path):
    """Saving such a tokenizer with transformers loses what makes the loader put it there after special
    tokens, too."""
    ids = stock_ids(llama_kind)
    source = tmp_path / "source"
    if kind == "adapter":
        save_adapter(source, llama_kind)
    else:
        save_final_checkpoint(source, llama_kind, tokenizer=False)
        change_json(source / "config.json", vocab_size=ROWS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(llama_kind / name, source / name)
    export(source, tmp_path / "repo", verify=False)
    assert stock_ids(tmp_path / "repo") == ids
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "repo" / name).read_bytes() == (llama_kind / name).read_bytes()


def test_saving_with_transformers_would_not_do(llama_kind, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama_kind)
    assert isinstance(tokenizer, LlamaTokenizer)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((llama_kind / "config.json").read_bytes())
    assert stock_ids(tmp_path) != stock_ids(llama_kind)


CAUSAL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & CONFIG_MAPPING.keys())
DECLARED = (
    None,
    "GPT2TokenizerFast",
    "LlamaTokenizer",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "NoSuchTokenizer",
)


def family_config(model_type):
    config = CONFIG_MAPPING[model_type]()
    config.transformers_version = "4.40.0"
    return config


@pytest.mark.parametrize("kind", slow_but("byte level", of=["byte level", "sentencepiece"]))
@pytest.mark.parametrize("declared", slow_but("LlamaTokenizer", of=DECLARED))
def test_every_family_with_a_foreign_class(declared, kind, tmp_path):
    """Beside a config of each family that has a tokenizer in transformers; what stock cannot load is not
    compared."""
    compared = 0
    text = byte_level() if kind == "byte level" else sentencepiece_kind()
    families = [name for name in CAUSAL_TYPES if TOKENIZER_MAPPING_NAMES.get(name) is not None]
    for model_type in families:
        folder = tmp_path / model_type
        fields = {} if declared is None else {"tokenizer_class": declared}
        write_tokenizer_files(folder / "base", text, **fields, **END)
        try:
            config = family_config(model_type)
            config.save_pretrained(folder / "base")
            stock = behaviour(AutoTokenizer.from_pretrained(folder / "base", trust_remote_code=False), "x")
        except Exception:  # a class that needs files or packages that are not here, a config without defaults
            continue
        write_repo(folder / "repo", folder / "base", config)
        repo = AutoTokenizer.from_pretrained(folder / "repo", trust_remote_code=False)
        assert differences(behaviour(repo, "x"), stock) == [], model_type
        compared += 1
    assert compared >= len(families) * 2 // 3, f"{compared} of {len(families)}"


def test_what_a_loader_mends_beside_the_foundation_is_saved(tmp_path):
    """transformers mends the expression of large tokenizers beside an old config of Mistral's, and not beside
    ours."""
    fields = json.loads(byte_level(split_digits=False))
    vocabulary = fields["model"]["vocab"]
    vocabulary.update({f"filler{index}": index for index in range(len(vocabulary), 100_100)})
    base = tmp_path / "base"
    write_tokenizer_files(
        base, json.dumps(fields), tokenizer_class="LlamaTokenizerFast", fix_mistral_regex=True, **END
    )
    config = family_config("mistral")
    config.save_pretrained(base)
    change_json(base / "config.json", transformers_version=config.transformers_version)
    write_repo(tmp_path / "repo", base, config)
    mended = stock_ids(base)
    assert stock_ids(tmp_path / "repo") == mended
    change_json(base / "tokenizer_config.json", fix_mistral_regex=False)
    assert mended != stock_ids(base)


def write_repo(repo, source, config):
    repo.mkdir()
    (repo / "config.json").write_text(json.dumps({"model_type": "dylora_moe", "auto_map": AUTO_MAP}))
    write_tokenizer(open_tokenizer("x", source, config, None), repo, DyloraMoeConfig(base_config=config))


def test_every_file_that_a_class_reads_is_among_a_repos_files():
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    names = {TOKENIZER_MAPPING_NAMES.get(model_type) for model_type in CAUSAL_TYPES} - {None}
    for name in names:
        try:
            files = tokenizer_class_from_name(name).vocab_files_names.values()
        except ImportError:  # of a package that is not installed
            continue
        assert all(map(is_tokenizer_file, files)), name


NO_VOCABULARY = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "CodeGenTokenizer",
    "GemmaTokenizer",
)


@pytest.mark.parametrize("place", ["adapter", "foundation"])
@pytest.mark.parametrize("name", NO_VOCABULARY)
def test_a_class_without_its_vocabulary_is_no_tokenizer(name, place, foundation, tmp_path):
    base = shutil.copytree(foundation, tmp_path / "base")
    source = save_adapter(tmp_path / "adapter", base)
    remove_tokenizer(base)
    folder = {"adapter": source, "foundation": base}[place]
    remove_tokenizer(source)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(InputError, match=r"no tokens but its special ones.*--tokenizer"):
        export(source, tmp_path / "repo", verify=False)
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize("name", NO_VOCABULARY)
def test_verify_calls_a_class_without_its_vocabulary_wrong(name, repo):
    remove_tokenizer(repo)
    (repo / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    finding = next(entry for entry in verify(repo).findings if entry.what == "tokenizer")
    assert finding.passed is False and "no tokens but its special ones" in finding.detail


def test_a_tokenizer_of_one_token_is_refused(foundation, tmp_path):
    """T5's class has a blank and a hundred special tokens without its file."""
    base = save_foundation(tmp_path / "base", vocab_size=300)
    source = save_adapter(tmp_path / "adapter", base)
    remove_tokenizer(base)
    remove_tokenizer(source)
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    with pytest.raises(InputError, match="has no tokens but its special ones and one more"):
        export(source, tmp_path / "repo", verify=False)


def test_added_tokens_are_no_vocabulary(foundation, tmp_path):
    """Gemma 3's tokenizer_config.json lists 6415 tokens of 262144."""
    source = save_adapter(tmp_path / "adapter", foundation)
    remove_tokenizer(source)
    listed = {str(index): {"content": f"<unused{index}>", "special": False} for index in range(4, 60)}
    fields = {"tokenizer_class": "GemmaTokenizer", "added_tokens_decoder": listed}
    (source / "tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="no tokens but its special ones"):
        export(source, tmp_path / "repo", tokenizer=str(source), verify=False)


def test_a_class_without_its_vocabulary_is_refused_where_the_foundation_is_not_at_hand(foundation, tmp_path):
    source = save_adapter(tmp_path / "adapter", foundation)
    change_json(source / "adapter_config.json", base_model_name_or_path="nobody/nothing")
    remove_tokenizer(source)
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(InputError, match="no tokens but its special ones"):
        export(source, tmp_path / "repo", layout="adapter", verify=False)


@pytest.mark.slow
def test_a_chat_template_that_tells_the_time_is_no_difference(granite_adapter, tmp_path):
    source = shutil.copytree(granite_adapter, tmp_path / "adapter")
    template = "{{ strftime_now('%H:%M:%S.%f') }} {{ messages[0]['content'] }}"
    change_json(source / "tokenizer_config.json", chat_template=template)
    export(source, tmp_path / "repo", verify=False)
    findings = {entry.what: entry.passed for entry in verify(tmp_path / "repo", against=source).findings}
    assert findings["tokenizer"] is True and findings["tokenizer of the source"] is True


def test_verify_compares_with_what_the_foundations_config_makes_of_it(granite, granite_adapter, tmp_path):
    export(granite_adapter, tmp_path / "repo", verify=False)
    change_json(tmp_path / "repo" / "tokenizer_config.json", tokenizer_class="GPT2TokenizerFast")
    finding = next(entry for entry in verify(tmp_path / "repo").findings if entry.what == "tokenizer")
    assert finding.passed is False and "beside its base model" in finding.detail
    against = verify(tmp_path / "repo", against=granite_adapter).findings
    assert next(entry for entry in against if entry.what == "tokenizer of the source").passed is False


def test_other_tokens_than_those_of_transformers_4_are_said(llama_kind, tmp_path):
    """LlamaTokenizer rebuilds its tokenizer from parts, and puts no blank before text that begins with
    one."""
    source = save_adapter(tmp_path / "adapter", llama_kind)
    with pytest.warns(DyloraMoeWarning, match=r"other tokens than its tokenizer\.json"):
        export(source, tmp_path / "repo", verify=False)


def test_a_tokenizer_that_is_taken_as_it_stands_gives_no_warning(granite_adapter, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DyloraMoeWarning)
        export(granite_adapter, tmp_path / "repo", verify=False)


def test_another_tokenizer_than_the_foundations_is_said(granite, granite_adapter, tmp_path):
    source = shutil.copytree(granite_adapter, tmp_path / "adapter")
    write_tokenizer_files(source, byte_level(split_digits=False), tokenizer_class="GPT2TokenizerFast", **END)
    with pytest.warns(DyloraMoeWarning, match="is not the base model's"):
        export(source, tmp_path / "repo", verify=False)
    with pytest.raises(InputError, match=r"of the \d+ tokens of the base model's own"):
        write_tokenizer_files(source, sentencepiece_kind(), tokenizer_class="PreTrainedTokenizerFast", **END)
        export(source, tmp_path / "other", verify=False)


def test_a_model_that_transformers_knows_by_its_name_keeps_its_class(monkeypatch, tmp_path):
    """Its folder in the Hub's cache has another name, so that the class that its files declare would be
    taken."""
    name = "deepseek-ai/deepseek-coder-small"
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--deepseek-ai--deepseek-coder-small" / "snapshots" / ("0" * 40)
    save_foundation(snapshot, vocab_size=ROWS)
    write_tokenizer_files(snapshot, byte_level(), tokenizer_class="GPT2TokenizerFast", **END)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    stock = AutoTokenizer.from_pretrained(name, cache_dir=cache)
    expected = [stock(text)["input_ids"] for text in SAMPLES]
    loaded = find_model(name).load_tokenizer()
    assert [loaded(text)["input_ids"] for text in SAMPLES] == expected
    own = foundations_tokenizer(FoundationReference(name, None)).tokenizer
    assert [own(text)["input_ids"] for text in SAMPLES] == expected


def test_a_tokenizer_that_needs_sentencepiece_says_so(foundation, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # importing it fails, where it is installed, too
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: False)
    source = save_adapter(tmp_path / "adapter", foundation)
    remove_tokenizer(source)
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (source / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(InputError, match=r"tokenizer\.model needs a package .*pip install sentencepiece"):
        export(source, tmp_path / "repo", verify=False)


def test_a_tokenizer_that_needs_another_protobuf_says_so(monkeypatch, tmp_path):
    """Where SentencePiece fails, transformers takes its file for one of tiktoken's, and that error is all it says."""

    def fail(*arguments):
        raise TrialError("Error parsing line b'\\x0e' in tokenizer.model")

    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: True)
    monkeypatch.setattr(tokenizer_files, "try_tokenizer", fail)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(InputError, match=r"tokenizer\.model needs .*: pip install -U sentencepiece protobuf"):
        load_tokenizer(tmp_path)


def test_a_foundations_tokenizer_that_fails_on_a_text_is_nothing_to_compare_with(
    granite, granite_adapter, tmp_path
):
    base = shutil.copytree(granite, tmp_path / "base")
    fields = json.loads(byte_level())
    fields["model"] = {"type": "WordLevel", "vocab": fields["model"]["vocab"], "unk_token": "no such token"}
    (base / "tokenizer.json").write_text(json.dumps(fields))
    export(granite_adapter, tmp_path / "repo", base_model=str(base), verify=False)
    assert stock_ids(tmp_path / "repo") == stock_ids(granite)


def test_a_repo_keeps_named_chat_templates(granite, granite_adapter, tmp_path):
    source = shutil.copytree(granite_adapter, tmp_path / "adapter")
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools: {{ messages[0]['content'] }}")
    export(source, tmp_path / "repo", verify=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "repo").chat_template.keys() == {"default", "tools"}


def test_verify_says_what_a_tokenizer_lacks(repo):
    (repo / "tokenizer.json").unlink()
    finding = next(entry for entry in verify(repo).findings if entry.what == "tokenizer")
    assert finding.passed is False and "the file that holds its vocabulary is missing" in finding.detail


def test_few_tokens_for_many_embeddings_are_said(tmp_path):
    base = save_foundation(tmp_path / "base", vocab_size=20_000)
    source = save_adapter(tmp_path / "adapter", base)
    with pytest.warns(DyloraMoeWarning, match="has 97 tokens, and the base model embeds 20000"):
        export(source, tmp_path / "repo", verify=False)
