"""Tiny random models of every layout, made once a session by the libraries that own the layouts."""

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The tests run side by side: a second thread for each would only get in the way of the others.
for _pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_pool, "1")

HIDDEN, HEADS, GROUPS, VOCABULARY = 32, 4, 2, 40
DECODERS = (
    "gpt2", "llama", "llama-bias-tied", "qwen2", "qwen3", "gemma2", "gemma3", "neox", "phi3", "mixtral", "qwen3-moe",
    "gpt-oss", "llama4", "falcon-new", "falcon-multi-query", "falcon-rw", "bloom", "opt", "mpt", "bigcode-multi-query",
    "bigcode", "codegen", "mistral", "qwen2-sliding", "gemma2-sliding", "gemma3-sliding", "gpt-oss-sliding",
)  # fmt: skip


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    common = {"bos_token_id": 1, "eos_token_id": 2}
    small = {
        "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "vocab_size": VOCABULARY,
        "intermediate_size": 48, **common,
    }  # fmt: skip
    grouped = small | {"num_key_value_heads": GROUPS}
    wide = grouped | {"head_dim": 12}
    gpt = {"n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCABULARY, "n_positions": 24, **common}
    bloom = {"hidden_size": HIDDEN, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCABULARY, **common}
    falcon = functools.partial(t.FalconConfig, **small)
    deep = grouped | {"num_hidden_layers": 4, "sliding_window": 3}  # layers that see three tokens, and others
    return {
        "gpt2": lambda: t.GPT2Config(**gpt),
        "llama": lambda: t.LlamaConfig(**grouped),
        "llama-bias-tied": lambda: t.LlamaConfig(
            **grouped, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
        ),
        "qwen2": lambda: t.Qwen2Config(**grouped),
        "qwen3": lambda: t.Qwen3Config(**wide),
        "gemma2": lambda: t.Gemma2Config(**wide),
        "gemma3": lambda: t.Gemma3TextConfig(**wide),
        "neox": lambda: t.GPTNeoXConfig(**small),
        "phi3": lambda: t.Phi3Config(**grouped, pad_token_id=0),
        "mixtral": lambda: t.MixtralConfig(**grouped, num_local_experts=3),
        "qwen3-moe": lambda: t.Qwen3MoeConfig(**wide, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16),
        "gpt-oss": lambda: t.GptOssConfig(**wide, num_local_experts=3, num_experts_per_tok=2),
        "llama4": lambda: t.Llama4TextConfig(**wide, num_local_experts=3, intermediate_size_mlp=24),
        "falcon-new": lambda: falcon(num_kv_heads=GROUPS, new_decoder_architecture=True),
        "falcon-multi-query": lambda: falcon(multi_query=True, new_decoder_architecture=False),
        "falcon-rw": lambda: falcon(multi_query=False, new_decoder_architecture=False, bias=True, alibi=True),
        "bloom": lambda: t.BloomConfig(**bloom),
        "opt": lambda: t.OPTConfig(
            hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS, ffn_dim=48, vocab_size=VOCABULARY,
            max_position_embeddings=24, word_embed_proj_dim=HIDDEN, **common,
        ),
        "mpt": lambda: t.MptConfig(
            d_model=HIDDEN, n_layers=2, n_heads=HEADS, vocab_size=VOCABULARY, max_seq_len=24, **common
        ),
        "bigcode-multi-query": lambda: t.GPTBigCodeConfig(**gpt, multi_query=True),
        "bigcode": lambda: t.GPTBigCodeConfig(**gpt, multi_query=False),
        "codegen": lambda: t.CodeGenConfig(**gpt, rotary_dim=4),
        "mistral": lambda: t.MistralConfig(**grouped, sliding_window=3),
        "qwen2-sliding": lambda: t.Qwen2Config(**deep, use_sliding_window=True, max_window_layers=2),
        "gemma2-sliding": lambda: t.Gemma2Config(**deep, head_dim=12),
        "gemma3-sliding": lambda: t.Gemma3TextConfig(
            **deep, head_dim=12, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        "gpt-oss-sliding": lambda: t.GptOssConfig(**deep, head_dim=12, num_local_experts=3, num_experts_per_tok=2),
    }  # fmt: skip


class Library:
    """Models by family. `model(name)` is shared: tests that change weights take `fresh(name)`."""

    def __init__(self, folder: Path):
        import torch
        import transformers

        torch.set_num_threads(1)  # for matrices this small threads cost more than they bring
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.folder = folder
        self.configs = _configs()
        self._models: dict[str, Any] = {}

    def model(self, family: str) -> Any:
        """A model with every parameter drawn at random, biases and norms too (they start at 0 and 1)."""
        import torch
        import transformers

        if family not in self._models:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(self.configs[family]()).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0, 0.2)
            self._models[family] = model.requires_grad_(False)
        return self._models[family]

    def fresh(self, family: str) -> Any:
        """A copy of the model that a test may change."""
        import copy

        return copy.deepcopy(self.model(family))

    def saved(self, family: str) -> Path:
        """The model as its library saves it: one safetensors file and config.json."""
        path = self.folder / family
        if not path.exists():
            self.model(family).save_pretrained(path)
        return path


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what importing transformers and PEFT deprecates is not ours
        import peft  # noqa: F401

        return Library(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="session")
def in_new_process() -> Callable[..., subprocess.CompletedProcess]:
    """Run `python ARGUMENTS` in a process of its own."""

    def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )

    return run
