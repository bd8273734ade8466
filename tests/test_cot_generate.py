"""What is sampled follows the model's distribution, one chain at a time or many at once, and is kept."""

import json
import string
import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DECODERS, VOCABULARY
from scipy.stats import chisquare
from test_prompts import CHAT, bpe

from finetune_lens import zoo
from finetune_lens.cot import generate
from finetune_lens.cot.chains import Chain, count, read_chains, write_chains
from finetune_lens.cot.generate import Ends, Written, probabilities, sample, templated, token_ids, write
from finetune_lens.cot.trials import written_within
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.stream import Store

PROMPTS = [[5, 9, 30, 7, 11, 8], [4, 4, 21], [33], [17, 6, 5, 39]]
NAMES = ["a", "b", "c", "d"]


def forty() -> Any:
    """A token a letter, for models of 40 tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *string.ascii_letters[: VOCABULARY - 3]])}
    raw = Tokenizer(models.WordLevel(table, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


LOST = ["x-y", "don't", "a~", "b+", "é!"]  # words of a vocabulary that its tokenizer cuts in two when it reads them


def split_words(*, unknown: bool = True) -> Any:
    """A token a word, for models of 40 tokens; LOST are read as unknown, or not at all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<bos>", "<eos>", *LOST, ";", "=", *string.ascii_letters]
    table = {token: i for i, token in enumerate(names[:VOCABULARY])}
    raw = Tokenizer(models.WordLevel(table, unk_token="<unk>" if unknown else "none"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    known = {"unk_token": "<unk>"} if unknown else {}
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", **known)


def greedy_oracle(module: Any, prompt: list[int], tokens: int) -> tuple[int, ...]:
    """What transformers generates after one prompt."""
    ids = torch.tensor([prompt])
    found = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )[0, len(prompt) :].tolist()
    return tuple(found[: found.index(2)] if 2 in found else found)


@pytest.mark.parametrize("family", DECODERS)
def test_each_token_follows_from_all_before_it(library, family):
    """Rows of unlike prompts that leave the batch one by one: the logits at every step are a whole text's."""
    model = HookedModel(library.model(family), forty())
    texts = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(2)).tolist()
    of, seen = [0, 0, 1, 2, 3, 3], {}
    for row in range(6):
        texts[row][3 + 2 * row :] = [2] * len(texts[row][3 + 2 * row :])

    def choose(logits: torch.Tensor, rows: list[int], step: int) -> list[int]:
        seen.update({(row, step): one for row, one in zip(rows, logits, strict=True)})
        return [texts[row][step] for row in rows]

    found: dict[int, Written] = {}
    write(model, PROMPTS, of, choose, Ends(model, [], 12), found.__setitem__)
    for row, text in enumerate(texts):
        kept = min(3 + 2 * row, 12)
        assert found[row].tokens == tuple(text[:kept])
        assert found[row].ending == ("eos" if kept < 12 else "length")
        expected = model.module(torch.tensor([PROMPTS[of[row]] + text[:kept]]), use_cache=False).logits[0]
        steps = torch.stack([seen.pop((row, step)) for step in range(min(kept + 1, 12))])
        torch.testing.assert_close(steps, expected[len(PROMPTS[of[row]]) - 1 :][: len(steps)], atol=1e-5, rtol=1e-5)
    assert not seen  # nothing was computed for a row that had ended


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma2-sliding", "mistral", "gpt-oss-sliding", "mpt"])
def test_greedy_chains_are_those_that_transformers_generates(library, family):
    model = HookedModel(library.model(family), forty())
    chains = sample(model, PROMPTS, names=NAMES, temperature=0, max_tokens=12, progress=False)
    assert [chain.tokens for chain in chains] == [greedy_oracle(model.module, prompt, 12) for prompt in PROMPTS]
    assert len({chain.tokens for chain in chains}) > 1
    for chain in chains:
        assert chain.ending == ("length" if len(chain.tokens) == 12 else "eos")
        assert chain.text == model.tokenizer.decode(list(chain.tokens))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2-sliding", "gpt-oss-sliding", "mpt", "qwen3-moe"])
def test_what_else_is_in_the_batch_has_no_part_in_a_chain(library, family):
    model = HookedModel(library.model(family), forty())

    def chains(names: list[str], samples: int = 3, **given: Any) -> dict[tuple[str, int], Chain]:
        prompts = [PROMPTS[NAMES.index(name)] for name in names]
        given = {"max_tokens": 14, "seed": 1, "temperature": 0.7, "progress": False} | given
        found = sample(model, prompts, names=names, samples=samples, **given)
        return {(chain.question, chain.sample): chain for chain in found}

    together = chains(NAMES)
    assert list(together) == [(name, number) for name in NAMES for number in range(3)]
    assert len({chain.tokens for chain in together.values()}) > 9
    assert len({chain.ending for chain in together.values()}) == 2  # some leave the batch before others
    alone = {key: chain for name in NAMES for key, chain in chains([name], batch_size=1).items()}
    assert alone == together
    assert chains(NAMES[::-1], batch_size=5) == together
    assert chains(["c"], samples=5).items() >= {key: together[key] for key in together if key[0] == "c"}.items()
    longer = chains(NAMES, max_tokens=16)  # the same draws, and more of them
    assert all(longer[key].tokens[: len(chain.tokens)] == chain.tokens for key, chain in together.items())
    assert chains(NAMES, seed=2) != together


@pytest.mark.parametrize(("temperature", "top_p"), [(0.3, 1.0), (0.5, 0.8)])
def test_samples_follow_the_distribution(library, temperature, top_p):
    """Pairs of tokens: both the first and, given it, the second."""
    model, samples = HookedModel(library.model("llama"), forty()), 4000
    chains = sample(
        model, [PROMPTS[0]], names=["q"], samples=samples, temperature=temperature, top_p=top_p, max_tokens=2,
        batch_size=1000, progress=False,
    )  # fmt: skip

    def next_token(ids: list[int]) -> np.ndarray:
        found = model.module(torch.tensor([ids])).logits[0, -1].double()
        return naive_nucleus((found / temperature).softmax(-1).numpy(), top_p)

    first = next_token(PROMPTS[0])
    expected = {(token,): p for token, p in enumerate(first) if token == 2}
    for one in np.flatnonzero(first):
        if one != 2:
            expected |= {(one, other): first[one] * p for other, p in enumerate(next_token([*PROMPTS[0], one]))}
    found = Counter((2,) if not c.tokens else c.tokens if len(c.tokens) == 2 else (*c.tokens, 2) for c in chains)
    assert all(expected[key] > 0 for key in found)
    common = [key for key, p in expected.items() if p * samples >= 8]
    counts = [found[key] for key in common]
    shares = [expected[key] * samples for key in common]
    assert len(common) > 10
    rest = [samples - sum(counts)], [samples - sum(shares)]
    assert chisquare(counts + rest[0], shares + rest[1]).pvalue > 0.01


def naive_nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    kept, held = np.zeros_like(probs), 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if held < top_p:
            kept[token] = probs[token]
            held += probs[token]
    return kept / kept.sum()


@pytest.mark.parametrize("size", [5, 3000])
def test_the_nucleus_is_the_fewest_likeliest_tokens(size):
    generator = torch.Generator().manual_seed(0)
    # a peaked row, a flat one of which the 1024 likeliest do not hold enough, one of few tokens
    logits = torch.randn(3, size, generator=generator) * torch.tensor([[4.0], [0.1], [1.0]])
    logits[2, 4:] = -torch.inf
    for top_p in (0.01, 0.5, 0.95, 1.0):
        found = probabilities(logits, temperature=0.9, top_p=top_p)
        for row, values in zip(found, logits, strict=True):
            exact = (values.double() / 0.9).softmax(-1).numpy()
            np.testing.assert_allclose((row / row.sum()).numpy(), naive_nucleus(exact, top_p), atol=1e-12)
    tied = probabilities(torch.zeros(1, 8), temperature=1.0, top_p=0.3)
    assert (tied > 0).all()  # which of them is in does not hang on their order


def scripted(model: HookedModel, prompt: list[int], texts: list[list[int]], ends: Ends) -> list[Written]:
    """What stands written where these are the tokens that come."""
    found: dict[int, Written] = {}
    write(model, [prompt], [0] * len(texts), lambda logits, rows, step: [texts[r][step] for r in rows], ends,
          found.__setitem__)  # fmt: skip
    return [found[row] for row in range(len(texts))]


def test_what_ends_a_chain(library):
    tokenizer = bpe(front=["<bos>"])

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    config = type(library.model("llama").config)(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=len(tokenizer),
        bos_token_id=1, eos_token_id=[2, 4],
    )  # fmt: skip
    model = HookedModel(type(library.model("llama"))(config).eval(), tokenizer)
    prompt = tokenizer("The capital")["input_ids"]
    plain = ids(" of France is Paris .")
    assert len(ids(" Paris")) == len(ids(" river")) == 1
    accent = ids(" é")  # bytes, a token each
    texts = [
        [*plain, 2], [*plain, 4, *plain], [2], [*plain, *plain, *plain], [*plain[:2], *ids(" Paris Germany"), *plain],
        [*ids(" and the river"), *plain, *plain], [*accent, *ids(" river"), 2],
    ]  # fmt: skip
    found = scripted(model, prompt, texts, Ends(model, ["ris Ger", "er"], 9))
    assert found == [
        (" of France is Paris .", tuple(plain), "eos"),
        (" of France is Paris .", tuple(plain), "eos"),
        ("", (), "eos"),
        (" of France is Paris . of France is Paris", (*plain, *plain)[:9], "length"),
        (" of France Pa", tuple(plain[:2]), "stop"),  # it begins within a token and ends within the next one
        (" and the riv", tuple(ids(" and the")), "stop"),
        (" é riv", tuple(accent), "stop"),
    ]
    assert scripted(model, prompt, texts[4:5], Ends(model, [], 9))[0].ending == "length"
    # what stands before the chain is not looked at
    assert scripted(model, prompt, texts[:1], Ends(model, ["capital", "tal of"], 9))[0].ending == "eos"
    # of several the one that comes first, wherever it is named
    assert scripted(model, prompt, texts[:1], Ends(model, [" Paris", " France is", "is"], 9))[0].text == " of"


def test_sentencepiece_keeps_the_space_before_its_first_word():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {piece: i for i, piece in enumerate(["<unk>", "</s>", "▁two", "▁and", "▁four", "."])}
    raw = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    assert tokenizer.decode([3, 2]) == "and two"
    config = SimpleNamespace(eos_token_id=1, get_text_config=lambda: config)
    model: Any = SimpleNamespace(module=SimpleNamespace(config=config), require_tokenizer=lambda: tokenizer)
    ends = Ends(model, [" four"], 9)
    assert ends.of([2], [3, 2, 1]) == (" and two", (3, 2), "eos")
    assert ends.of([2], [3, 4]) == (" and", (3,), "stop")
    assert ends.of([2], [4]) == ("", (), "stop")


def test_the_longest_text_of_the_model_ends_a_chain(library):
    model = HookedModel(library.model("gpt2"), forty())
    long = [3 + i for i in range(20)]
    short, found = sample(model, [[5], long], names=["s", "l"], max_tokens=9, temperature=0.1, progress=False)
    assert len(found.tokens) <= 4
    assert found.ending == "length"
    assert len(short.tokens) == 9
    with pytest.raises(InputError, match=r"prompt l has 24 tokens; .* fewer than the 24 that"):
        sample(model, [[5], [3] * 24], names=["s", "l"], progress=False)


@pytest.mark.parametrize("unknown", [True, False])
def test_a_chain_ends_before_what_its_tokenizer_cannot_read(library, unknown):
    model = HookedModel(library.model("llama"), split_words(unknown=unknown))
    prompts = token_ids(model.tokenizer, ["a b c", "d ; e"], ["p", "q"], False)
    given = {"names": ["p", "q"], "samples": 30, "temperature": 3.0, "top_p": 1.0, "max_tokens": 12, "progress": False}
    plain, found = sample(model, prompts, **given), written_within(model, prompts, room=1, stop=(), **given)
    lost = {model.tokenizer.convert_tokens_to_ids(word) for word in ["<unk>"] * (not unknown) + LOST}
    names = model.tokenizer.convert_ids_to_tokens
    for one, other in zip(plain, found, strict=True):
        first = next((n for n, token in enumerate(one.tokens) if token in lost), len(one.tokens))
        assert other.tokens == one.tokens[:first]
        assert other.text.split() == names(list(one.tokens[:first]))
        assert other.ending == ("unreadable" if first < len(one.tokens) else one.ending)
    assert {"unreadable", "length", "eos"} <= {chain.ending for chain in found}
    assert count(found)["unreadable"] > 10


def test_what_a_stop_leaves_of_a_word_may_be_no_word(library, monkeypatch):
    model = HookedModel(library.model("llama"), split_words())
    (lost,) = model.tokenizer.convert_tokens_to_ids(["é!"])
    written = Ends(model, ["!"], 9).of([11, 12], [13, lost])
    assert written == Written(" d é", (13,), "stop")
    monkeypatch.setattr(generate, "sample", lambda *a, **k: [Chain("p", 0, *written)])
    assert written_within(model, [[11, 12]], room=1, stop=["!"], max_tokens=9) == [
        Chain("p", 0, " d", (13,), "unreadable")
    ]


def test_an_interrupted_run_goes_on(library, tmp_path, monkeypatch):
    model = HookedModel(library.model("llama"), forty(), fingerprint="files")
    given: dict[str, Any] = {"names": NAMES, "samples": 2, "max_tokens": 7, "progress": False, "batch_size": 3}
    expected = sample(model, PROMPTS, **given)
    put, done = Store.put, []

    def counted(store: Store, name: str, row: Any) -> None:
        if len(done) == 4:
            raise KeyboardInterrupt
        put(store, name, row)
        done.append(name)

    monkeypatch.setattr(Store, "put", counted)
    with pytest.raises(KeyboardInterrupt):
        sample(model, PROMPTS, partial=tmp_path, **given)
    written: list[str] = []
    monkeypatch.setattr(Store, "put", lambda store, name, row: (put(store, name, row), written.append(name)))

    def again(**changed: Any) -> tuple[list[Chain], int]:
        written.clear()
        return sample(model, PROMPTS, partial=tmp_path, **given | changed), len(written)

    assert again() == (expected, 4)
    assert not {*written} & {*done}
    assert again(batch_size=8) == (expected, 0)
    more, new = again(samples=3)
    assert new == 4
    assert [chain for chain in more if chain.sample < 2] == expected
    assert again(seed=5)[1] == 8
    assert again(seed=5)[1] == 0
    for changed in ({"temperature": 0.5}, {"top_p": 0.5}, {"max_tokens": 6}, {"stop": ["ab"]}):
        again()
        assert again(**changed)[1] == 8, changed
    model.fingerprint = "other files"
    assert again(stop=["ab"])[1] == 8


def test_memory_that_does_not_hold_the_batch(library, monkeypatch):
    from finetune_lens.cot import generate

    model = HookedModel(library.model("llama"), forty())
    given: dict[str, Any] = {"names": NAMES, "max_tokens": 5, "progress": False}
    expected, sizes = sample(model, PROMPTS, **given), []

    def narrow(model: HookedModel, prompts: Any, of: Any, *rest: Any) -> None:
        sizes.append(len(of))
        if len(of) > limit:
            raise torch.OutOfMemoryError
        write(model, prompts, of, *rest)

    monkeypatch.setattr(generate, "write", narrow)
    limit = 1
    assert sample(model, PROMPTS, **given) == expected
    assert sizes == [4, 2, 1, 1, 1, 1]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        sample(model, PROMPTS, **given)


def test_texts_and_templates():
    from finetune_lens.pair import ModelPair

    folder = zoo.path("strings")
    model = ModelPair.load(folder / "base", folder / "full").base
    texts, given = ["<copy>gafbdz=", "<copy>ab="], {"names": ["1", "2"], "temperature": 0, "progress": False}
    ids = [model.tokenizer(text)["input_ids"] for text in texts]
    assert sample(model, texts, **given, max_tokens=6) == sample(model, ids, **given, max_tokens=6)
    with pytest.raises(InputError, match="no chat template"):
        sample(model, texts, **given, template=True)
    with pytest.raises(InputError, match="no chat template"):
        templated(texts, model.tokenizer)
    [text] = templated(["Paris"], bpe(template=CHAT))
    assert text == "<bos><|system|>The capital of France is<|user|>Paris<|end|><|model|>"


def test_an_adapter_that_is_off(library):
    import peft

    plain = HookedModel(library.model("llama"), forty())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.5)
        outer = peft.get_peft_model(library.fresh("llama"), config)
    outer.train()
    given: dict[str, Any] = {"names": NAMES, "max_tokens": 8, "progress": False}
    on, off = (HookedModel(outer, forty(), adapted=adapted) for adapted in (True, False))
    assert sample(off, PROMPTS, **given) == sample(plain, PROMPTS, **given) != sample(on, PROMPTS, **given)
    assert sample(on, PROMPTS, **given) == sample(on, PROMPTS, **given)
    assert outer.training


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"names": ["a"]}, "4 prompts and 1 names"),
        ({"names": ["a", "a", "b", "c"]}, "1 names stand for several prompts: a"),
        ({"temperature": -1}, "temperature is 0 .* or more; found -1"),
        ({"temperature": float("nan")}, "temperature is 0"),
        ({"top_p": 0.0}, "top_p is a share"),
        ({"samples": 0}, "samples is at least 1"),
        ({"max_tokens": 0}, "max_tokens is at least 1"),
        ({"batch_size": 0}, "batch size is at least 1"),
        ({"temperature": 0, "samples": 2}, "every chain of a question is the same"),
        ({"stop": "So"}, "stop: expected several texts"),
        ({"stop": [""]}, "none of them empty"),
        ({"prompts": ["ab", [4], [5], [6]]}, "all texts or all token ids"),
        ({"prompts": [[4], [], [5], [6]]}, "prompt b has 0 tokens"),
        ({"prompts": [[4], [40], [5], [6]]}, "embeddings for 40 tokens"),
    ],
)
def test_bad_input(library, changed, message):
    given: dict[str, Any] = {"prompts": PROMPTS, "names": NAMES, "progress": False} | changed
    with pytest.raises(InputError, match=message):
        sample(HookedModel(library.model("llama"), forty()), **given)


def test_logits_that_are_not_numbers(library):
    module = library.fresh("llama")
    module.model.norm.weight[0] = float("nan")
    for temperature in (0, 1.0):
        with pytest.raises(InputError, match="logits that are NaN"):
            sample(HookedModel(module, forty()), [[4]], names=["a"], temperature=temperature, progress=False)


def test_files_of_chains(tmp_path):
    chains = [
        Chain("q1", 0, "one\ntwo é", (3, 4), "stop"),
        Chain("q1", 1, "", (), "eos"),
        Chain("q2", 0, " x\0", (9,), "length"),
    ]
    path = tmp_path / "chains.jsonl"
    write_chains(path, chains)
    assert read_chains(path, ["q1", "q2"]) == chains
    assert read_chains(path, [SimpleNamespace(id="q2"), SimpleNamespace(id="q1")]) == [*chains[2:], *chains[:2]]
    assert count(chains) == {"stop": 1, "eos": 1, "length": 1, "empty": 1}
    # of a model behind an API: bare texts, an empty one, ids that are numbers
    lines = [{"id": 1, "text": "a"}, {"id": 2, "text": ""}, {"id": 1, "text": "b"}, {"id": 1, "sample": 7, "text": "c"}]
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    assert [(c.question, c.sample, c.text, c.ending) for c in read_chains(path, ["1", "2"])] == [
        ("1", 0, "a", "given"), ("1", 1, "b", "given"), ("1", 7, "c", "given"), ("2", 0, "", "given"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "q1", "text": "a"}'], "no chain for 1 of 2 questions: q2"),
        (['{"id": "q3", "text": "a"}'], "line 1: no question has the id 'q3'"),
        (['{"id": "q1", "sample": 0, "text": "a"}'] * 2, "line 2: a second chain for question 'q1', sample 0"),
        (['{"id": "q1", "chain": "a"}'], "line 1: expected an object such as"),
        (['["q1", "a"]'], "line 1: expected an object such as"),
        (['{"id": "q1", "text": 3}'], "line 1: `text`: expected text"),
        (['{"id": "q1", "text": "\\ud83d"}'], "line 1: `text`: expected text"),
        (['{"id": "q1", "text": "a", "sample": -1}'], "`sample`: expected a whole number from 0, found -1"),
        (['{"id": "q1", "text": "a", "sample": true}'], "`sample`: expected a whole number"),
        (['{"id": "q1", "text": "a", "ending": "tired"}'], "`ending` is one of eos, stop, length, unreadable, given"),
        (['{"id": "q1", "text": "a", "tokens": "ab"}'], "`tokens`: expected a list of token ids"),
        (['{"id": "q1", "text": "a"}', "{"], "line 2 is not JSON"),
    ],
)
def test_bad_files_of_chains(tmp_path, lines, message):
    path = tmp_path / "chains.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        read_chains(path, ["q1", "q2"])
    with pytest.raises(InputError, match="is not there"):
        read_chains(tmp_path / "none.jsonl", ["q1"])
