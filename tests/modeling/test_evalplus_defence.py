"""EvalPlus 0.3.1 leaves its stopping criteria on the model; ours sheds them after every `generate`."""

import pytest
import torch
from helpers_models import build


stop_sequencer = pytest.importorskip("stop_sequencer")


class LetterTokenizer:
    """Token n is one letter; what the criterion needs of a tokenizer."""

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") + int(token) % 26) for token in ids)


@pytest.fixture
def counted(monkeypatch):
    """How many EvalPlus criteria each call of `generate` carries."""
    from transformers import GenerationMixin

    counts = []
    run = GenerationMixin._sample

    def counting_run(self, input_ids, logits_processor, stopping_criteria, **kwargs):
        counts.append(sum(type(c).__name__ == "StopSequenceCriteria" for c in stopping_criteria))
        return run(self, input_ids, logits_processor, stopping_criteria, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_sample", counting_run)
    return counts


def evalplus_generate(model, ids, stop_texts):
    """What `HuggingFaceDecoder.codegen` does around `generate`."""
    sequencer = stop_sequencer.StopSequencer(model, model_type="causal", tokenizer=LetterTokenizer())
    model = sequencer.register_stop_texts(stop_texts=stop_texts, input_length=ids.size(-1))
    with torch.inference_mode():
        return model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[
            0, ids.size(-1) :
        ].tolist()


def test_nothing_is_left_and_each_call_carries_one_criterion(counted):
    model = build()
    prompts = [torch.randint(3, 97, (1, length)) for length in (4, 9, 6, 12)]
    fresh = [evalplus_generate(build(), prompt, ["aaa", "qz"]) for prompt in prompts]
    counted.clear()
    found = []
    for prompt in prompts:
        found.append(evalplus_generate(model, prompt, ["aaa", "qz"]))
        assert "_get_stopping_criteria" not in vars(model)
    assert counted == [1, 1, 1, 1]
    assert found == fresh


def test_a_longer_prompt_is_not_read_as_output_of_a_shorter_one():
    """Without the defence the second prompt stops after one token, since it holds a stop text itself."""
    model = build()
    evalplus_generate(model, torch.tensor([[5, 6]]), ["mno"])
    prompt = torch.tensor([[5, 6, 7, 8, 12, 13, 14, 9]])  # ... m n o ...
    assert (
        len(evalplus_generate(model, prompt, ["mno"])) == len(evalplus_generate(build(), prompt, ["mno"])) > 1
    )


def test_the_model_is_clean_after_a_call_that_fails():
    model = build()
    with pytest.raises(ValueError):
        sequencer = stop_sequencer.StopSequencer(model, model_type="causal", tokenizer=LetterTokenizer())
        sequencer.register_stop_texts(stop_texts=["x"], input_length=2).generate(
            torch.tensor([[4, 5]]), routing_strategy="nope"
        )
    assert "_get_stopping_criteria" not in vars(model)
