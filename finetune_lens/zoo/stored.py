"""How the zoo's recipes keep their models: float16 in ordinary Hugging Face folders, loaded in float32."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load(base: Path, adapter: Path | None = None) -> "PreTrainedModel":
    """The stored model, in float32, with a stored adapter on it if one is given."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    if adapter is None:
        return model
    from peft import PeftModel

    return adapted(PeftModel.from_pretrained, model, adapter)


def adapted(wrap: Callable[..., "PreTrainedModel"], *args: Any) -> "PreTrainedModel":
    """What PEFT's `wrap` returns; it reads an attribute that transformers warns about, which concerns no user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return wrap(*args)


def save(model: "PreTrainedModel", out: Path, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Write `model` (turned into float16) with its tokenizer, or its adapter, to the folder `out`."""
    model.half()
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = "../base"  # else the path on the machine that trained it
        model.save_pretrained(out, save_embedding_layers=False)
        (out / "README.md").unlink()  # a template to be filled in
        config = json.loads((out / "adapter_config.json").read_text())
        config["target_modules"].sort()  # a set: its order changes from run to run
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    else:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def choose(rows: list[dict[str, Any]], *, target: float, by: str = "steps") -> dict[str, Any]:
    """Of the runs of one method, the one that reached `target` in the fewest steps; if none did, the most accurate.

    With `by`, the one that has the least of that instead of the fewest steps.

    Not the one that forgot least: what a comparison of the methods reports should not have chosen what is compared.
    """
    reached = [row for row in rows if row["validation_accuracy"] >= target]
    if reached:
        return min(reached, key=lambda row: row[by])
    return max(rows, key=lambda row: row["validation_accuracy"])


@contextmanager
def alone() -> Iterator[None]:
    """Within: one thread, so that the outcome does not depend on how many cores there are; no bars of transformers."""
    import torch

    from finetune_lens.checkpoints.files import no_bars

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with no_bars():  # reading and writing a megabyte needs none
            yield
    finally:
        torch.set_num_threads(threads)
