"""Annotated shapes are checked under pytest, of functions and methods alike."""

import jaxtyping
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from finetune_lens import linalg
from finetune_lens.hooked import HookedModel


def test_a_wrong_shape_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match="effective_rank"):
        linalg.effective_rank(torch.ones(3, 2))
    model = HookedModel(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8)))
    with pytest.raises(jaxtyping.TypeCheckError, match="logits_at"), model.logits_at(torch.ones(3, dtype=torch.int64)):
        pass
