"""Small routed models with random weights, and the same mixtures computed the slow way with PEFT.

The slow way shares no code with the model: PEFT's own layers, one adapter after the other, one unpadded row
at a time, no cache. Weights that differ from token to token are applied by hooks on PEFT's `lora_B` modules.
"""

from contextlib import contextmanager
from pathlib import Path

import tokenizers
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


STRATEGIES = ("router", "best", "single:1", "ensemble", "round_robin", "base", "uniform")
PAD, VOCABULARY = 2, 97
LATENTS_ARE_CACHED = hasattr(DeepseekV3Attention, "expand_kv")  # by newer releases of transformers


SIZES = {  # of all foundations whose configs spell them so
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": PAD,
}


def llama_config(**fields) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, **fields})


def llama_experts() -> list[dict]:
    """Three experts of unequal ranks (4, 8, 3, one of them with a rank pattern) and unequal targets."""
    queries = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    values = [f"model.layers.{layer}.self_attn.v_proj" for layer in range(2)]
    downs = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    return [
        {"name": "first", "r": 4, "lora_alpha": 8, "target_modules": queries + values},
        {
            "name": "second",
            "r": 8,
            "lora_alpha": 4,
            "use_rslora": True,
            "target_modules": [queries[0], *values, *downs],
            "rank_pattern": {values[1]: 5},
            "alpha_pattern": {values[1]: 20},
        },
        {"name": "third", "r": 3, "lora_alpha": 7, "target_modules": [*queries, downs[1]]},
    ]


def randomise(model: DyloraMoeForCausalLM, seed: int = 0) -> DyloraMoeForCausalLM:
    """Weights large enough that experts differ, routes vary, and the two best logits lie far apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.expert_layers().values():
            for stack in (layer.lora_A, layer.lora_B):
                stack.copy_(torch.randn(stack.shape, generator=generator) * 0.35)
        if model.router is not None:
            for parameter in model.router.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        head = model.get_output_embeddings()
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    return model


def build(base_config=None, experts=None, seed: int = 0, **config_fields) -> DyloraMoeForCausalLM:
    """A routed model on the CPU in float32, in evaluation mode."""
    torch.manual_seed(seed)
    config = DyloraMoeConfig(
        base_config=base_config if base_config is not None else llama_config(),
        expert_configs=llama_experts() if experts is None else experts,
        **config_fields,
    )
    model = randomise(DyloraMoeForCausalLM(config), seed).eval()
    model.freeze_foundation()
    return model


def build_on_latent_attention() -> DyloraMoeForCausalLM:
    """Experts on the layer that makes keys and values of DeepSeek's latents: `[batch, 1, tokens, latent]`
    goes in, and where the latents are what is cached, those of all past tokens at every step."""
    heads = {
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    base = DeepseekV3Config(**{**SIZES, "num_key_value_heads": 4}, **heads, first_k_dense_replace=2)
    kinds = {"one": ("kv_b_proj",), "two": ("kv_b_proj", "o_proj"), "three": ("o_proj", "kv_a_proj_with_mqa")}
    experts = [
        {
            "name": name,
            "r": 3 + len(parts),
            "target_modules": [f"model.layers.{i}.self_attn.{part}" for i in range(2) for part in parts],
        }
        for name, parts in kinds.items()
    ]
    return build(base, experts)


def save_layouts(model: DyloraMoeForCausalLM, folder: Path) -> None:
    """`<folder>/full`, `<folder>/adapter` and the foundation of the second, `<folder>/foundation`."""
    PeftLoop(model).peft.unload().save_pretrained(folder / "foundation")
    model.config.base_model_name_or_path = str(folder / "foundation")
    for layout in ("full", "adapter"):
        model.save_pretrained(folder / layout, layout=layout)


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows of different lengths as one batch, padded on the left."""
    length = max(map(len, rows))
    ids = [[PAD] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def labelled_batch() -> dict[str, torch.Tensor]:
    """Two rows to train on, left-padded; padding counts for no loss."""
    batch = left_padded(random_rows((9, 6), seed=6))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def random_rows(lengths: tuple[int, ...], seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


class PeftLoop:
    """The same mixture as `model`, computed by PEFT from copies of its weights."""

    def __init__(self, model: DyloraMoeForCausalLM):
        self.config = model.config
        self.gate = None
        if model.router is not None:
            self.gate = nn.Linear(*reversed(model.router.gate.weight.shape))
            self.gate.load_state_dict(model.router.gate.state_dict())
        foundation = AutoModelForCausalLM.from_config(model.config.base_config)
        state = {k.replace(".base_layer.", "."): v for k, v in model.foundation.state_dict().items()}
        foundation.load_state_dict(
            {k: v for k, v in state.items() if ".lora_" not in k and not k.endswith(".prototypes")}
        )
        self.peft = None
        for expert in self.config.expert_configs:
            fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")
            lora = LoraConfig(**{name: expert[name] for name in fields})
            if self.peft is None:
                self.peft = get_peft_model(foundation, lora, adapter_name=expert["name"])
            else:
                self.peft.add_adapter(expert["name"], lora)
        self.peft.eval()
        for index, expert in enumerate(self.config.expert_configs):
            for name, (lora_a, lora_b) in model.expert_weights(index).items():
                layer = self.peft.base_model.model.get_submodule(name)
                layer.lora_A[expert["name"]].weight.data.copy_(lora_a)
                layer.lora_B[expert["name"]].weight.data.copy_(lora_b)

    @contextmanager
    def weighted(self, weights: torch.Tensor | None):
        """All adapters on, adapter i times `weights[..., i]` (`[1 or sequence, num_experts]`); `None`: all
        off."""
        if weights is None:
            with self.peft.disable_adapter():
                yield
            return
        self.peft.base_model.set_adapter(self.config.expert_names)
        handles = []
        for name, module in self.peft.named_modules():
            parts = name.split(".")
            if "lora_B" in parts[-2:-1]:
                column = weights[:, self.config.expert_names.index(parts[-1])]
                scale = column.unsqueeze(-1)  # [sequence or 1, 1]
                handles.append(module.register_forward_hook(lambda m, i, out, scale=scale: out * scale))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def weighted_by_layer(self, top_k: int):
        """All adapters on, weighted by arrow, from singular vectors of the whole products."""
        self.peft.base_model.set_adapter(self.config.expert_names)
        self.layer_scores = {}
        handles = []
        for name, layout in self.config.rank_layouts().items():
            layer = self.peft.base_model.model.get_submodule(name)
            vectors = {}
            for index, (rank, _) in enumerate(layout):
                if rank:
                    expert = self.config.expert_names[index]
                    product = layer.lora_B[expert].weight.double() @ layer.lora_A[expert].weight.double()
                    vectors[index] = torch.linalg.svd(product).Vh[0].float()
            of_layer = {}

            def score(module, inputs, name=name, vectors=vectors, of_layer=of_layer):
                scores = {index: (inputs[0][0] @ vector).abs() for index, vector in vectors.items()}
                self.layer_scores[name] = scores
                of_layer.update(self._weights_of_layer(scores, top_k))

            handles.append(layer.register_forward_pre_hook(score))
            for index in vectors:
                matrix = layer.lora_B[self.config.expert_names[index]]
                handles.append(
                    matrix.register_forward_hook(
                        lambda m, i, out, of_layer=of_layer, index=index: out * of_layer[index][:, None]
                    )
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _weights_of_layer(self, scores: dict[int, torch.Tensor], top_k: int) -> dict[int, torch.Tensor]:
        """Softmax over each token's largest scores, `[sequence]` for every expert."""
        weights = {index: torch.zeros(len(of_tokens)) for index, of_tokens in scores.items()}
        for token in range(len(next(iter(scores.values())))):
            chosen = sorted(scores, key=lambda index: -scores[index][token])[:top_k]
            values = torch.stack([scores[index][token] for index in chosen]) / self.config.router_temperature
            for index, value in zip(chosen, values.softmax(dim=0), strict=True):
                weights[index][token] = value
        return weights

    @torch.no_grad()
    def run(self, row: list[int], weights: torch.Tensor | None, top_k: int | None = None):
        """The PEFT model's output for one unpadded row, at `weights`, or at every layer's own (`top_k`)."""
        with self.weighted(weights) if top_k is None else self.weighted_by_layer(top_k):
            return self.peft(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False)

    def router_logits(self, row: list[int]) -> torch.Tensor:
        """`[sequence, num_experts]`."""
        everyone = torch.ones(1, self.config.num_experts)
        hidden = self.run(row, everyone if self.config.router_input == "experts_sum" else None).hidden_states[
            -1
        ][0]
        return self.gate(hidden).detach()

    def routing_weights(self, row: list[int], dense: bool) -> torch.Tensor:
        logits = self.router_logits(row)
        if dense:
            return torch.softmax(logits / self.config.router_temperature, dim=-1)
        weights = torch.zeros_like(logits)
        for token, token_logits in enumerate(logits):
            chosen = sorted(range(len(token_logits)), key=lambda i: -token_logits[i])[
                : self.config.num_experts_per_tok
            ]
            exponentials = torch.tensor([float(token_logits[i].exp()) for i in chosen])
            for i, value in zip(chosen, exponentials / exponentials.sum(), strict=True):
                weights[token, i] = value
        return weights

    def best(self, prompt: list[int], dense: bool = False) -> int:
        if self.config.routes_by_layer:
            return self._best_of_layers(prompt, dense)
        return int(torch.softmax(self.router_logits(prompt), dim=-1).mean(dim=0).argmax())

    def _best_of_layers(self, prompt: list[int], dense: bool) -> int:
        """The largest mean share over tokens and layers, of the layers that an expert shares with another."""
        self.run(prompt, None, self._top_k(dense))
        shares = {}
        for scores in self.layer_scores.values():
            if len(scores) > 1:
                together = torch.stack(list(scores.values()), dim=-1) / self.config.router_temperature
                for index, share in zip(scores, together.softmax(dim=-1).mean(dim=0).tolist(), strict=True):
                    shares.setdefault(index, []).append(share)
        return max(shares, key=lambda index: sum(shares[index]) / len(shares[index]))

    def _top_k(self, dense: bool) -> int:
        return self.config.num_experts if dense else self.config.num_experts_per_tok

    def one_hot(self, expert: int) -> torch.Tensor:
        return torch.eye(self.config.num_experts)[expert].unsqueeze(0)

    def logits(
        self, row: list[int], strategy: str, prompt_length: int, turn: int, dense: bool = False
    ) -> torch.Tensor:
        """`[sequence, vocabulary]` of one unpadded row under a strategy; `turn` is its number in round
        robin."""
        count = self.config.num_experts
        if strategy == "ensemble":
            each = [self.run(row, self.one_hot(expert)).logits[0].softmax(dim=-1) for expert in range(count)]
            return torch.stack(each).mean(dim=0).log()
        if strategy == "router" and self.config.routes_by_layer:
            return self.run(row, None, self._top_k(dense)).logits[0]
        weights = {
            "router": lambda: self.routing_weights(row, dense),
            "best": lambda: self.one_hot(self.best(row[:prompt_length], dense)),
            "round_robin": lambda: self.one_hot(turn % count),
            "base": lambda: None,
            "uniform": lambda: torch.full((1, count), 1 / count),
        }
        chosen = self.one_hot(int(strategy[7:])) if strategy.startswith("single:") else weights[strategy]()
        return self.run(row, chosen).logits[0]

    def greedy(self, prompt: list[int], strategy: str, turn: int, max_new_tokens: int) -> list[int]:
        """The new tokens of greedy decoding, recomputing everything at every token; no token ends it."""
        row = list(prompt)
        for _ in range(max_new_tokens):
            row.append(int(self.logits(row, strategy, len(prompt), turn)[-1].argmax()))
        return row[len(prompt) :]


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Every token is one character, that of `text_of`."""
    characters = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({text_of([t]): t for t in range(VOCABULARY)})
    )
    characters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[\\s\\S]"), "isolated")
    characters.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token=text_of([1]), pad_token=text_of([PAD])
    )


def visible_character_tokenizer() -> PreTrainedTokenizerFast:
    """One visible character a token, and three tokens at the end that are none."""
    words = {chr(33 + index): index for index in range(VOCABULARY - 3)} | {"<e1>": 94, "<e2>": 95, "<e3>": 96}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=chr(33 + PAD), eos_token=chr(34))


def text_of(tokens: list[int]) -> str:
    return "".join(chr(ord("0") + token) for token in tokens)
