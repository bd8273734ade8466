"""Examples scored in batches against one plain forward pass an example; gradients against autograd of the mean."""

import numpy as np
import pytest
import torch

from finetune_lens import InputError, ModelPair, zoo
from finetune_lens.evaluation import Examples, add_gradient, label_words, measure, read_examples
from finetune_lens.hooked import HookedModel
from finetune_lens.prompts import read_prompts
from finetune_lens.stats import calibration
from finetune_lens.tasks import strings


@pytest.fixture(scope="module")
def model():
    folder = zoo.path("strings")
    return ModelPair.load(folder / "base", folder / "full").tuned


def rows(n=12, tasks=("flip", "copy", "reverse"), seed=0):
    """Questions of different length: every second one has a letter more."""
    drawn = strings.draw(list(tasks), n, np.random.default_rng(seed), part="test")
    return [
        {"prompt": strings.question(task, text + "a"[: number % 2]), "answer": strings.answer(task, text)}
        for number, (task, text) in enumerate(drawn)
    ]


def plain(model, text):
    """Log-probabilities (pos, vocab) and ids of one text, nothing padded, all positions."""
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model.module(input_ids=ids).logits[0].log_softmax(-1), ids[0]


def test_whole_answers(model):
    flips = rows(tasks=("flip",))
    examples = read_examples(flips, [model.tokenizer])
    assert examples.objective == "answer"
    found = measure(model, examples)
    for n, row in enumerate(flips):
        start = len(model.tokenizer(row["prompt"]).input_ids)
        logs, ids = plain(model, row["prompt"] + row["answer"])
        said, answer = logs[start - 1 : -1], ids[start:]
        assert found.loss[n] == pytest.approx(-float(said.gather(-1, answer[:, None]).sum()), abs=1e-4)
        assert found.accuracy[n] == float((said.argmax(-1) == answer).all())
        assert found.confidence[n] == pytest.approx(float(said.max(-1).values.sum().exp()), abs=1e-4)
        assert found.prediction[n].tolist() == said.argmax(-1).tolist()
    assert 0 < found.accuracy.mean() < 1


def test_several_accepted_answers_add_up(model):
    item = {"prompt": "<flip>abcdef=", "answer": ["u", "v", "w"]}
    logs, _ = plain(model, item["prompt"])
    ids = [model.tokenizer.convert_tokens_to_ids(a) for a in item["answer"]]
    found = measure(model, read_examples([item], [model.tokenizer]))
    assert found.loss[0] == pytest.approx(-float(logs[-1, ids].logsumexp(0)), abs=1e-5)
    assert found.accuracy[0] == float(int(logs[-1].argmax()) in ids)


def test_label_words(model):
    items = [r | {"answer": "abc"[n % 3]} for n, r in enumerate(rows())]
    labels = label_words([read_prompts(items)])
    assert labels == ("a", "b", "c")
    examples = read_examples(items, [model.tokenizer], objective="labels", labels=labels)
    found = measure(model, examples)
    ids = [model.tokenizer.convert_tokens_to_ids(a) for a in labels]
    for n, item in enumerate(items):
        logs = plain(model, item["prompt"])[0][-1, ids].log_softmax(-1)
        assert found.loss[n] == pytest.approx(-float(logs[labels.index(item["answer"])]), abs=1e-4)
        assert found.prediction[n, 0] == int(logs.argmax())
        assert found.accuracy[n] == float(labels[int(logs.argmax())] == item["answer"])
        assert found.confidence[n] == pytest.approx(float(logs.max().exp()), abs=1e-4)


def test_texts_are_scored_as_transformers_does(model):
    texts = [r["prompt"] + r["answer"] for r in rows()]
    examples = read_examples(texts, [model.tokenizer])
    assert examples.objective == "text"
    found = measure(model, examples)
    for n, text in enumerate(texts):
        ids = model.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = model.module(input_ids=ids, labels=ids).loss
        assert found.loss[n] == pytest.approx(float(expected), abs=1e-5)
        logs, _ = plain(model, text)
        assert found.accuracy[n] == pytest.approx(float((logs[:-1].argmax(-1) == ids[0, 1:]).float().mean()))
    assert np.isnan(found.confidence).all()
    same = found.agreement(found)
    assert (same == 1).all()


@pytest.mark.parametrize("objective", ["answer", "labels", "text"])
def test_batched_is_unbatched_and_gradients_are_those_of_the_mean(library, objective):
    tokenizer = strings.tokenizer()
    items = [r | {"answer": "ab"[n % 2]} for n, r in enumerate(rows())] if objective == "labels" else rows()
    examples = read_examples(items, [tokenizer], objective=objective, labels=("a", "b"))
    model = HookedModel(library.fresh("llama"), tokenizer)
    alone, together = (measure(model, examples, batch_size=size) for size in (1, 12))
    for name in ("loss", "accuracy", "confidence", "prediction"):
        np.testing.assert_allclose(getattr(alone, name), getattr(together, name), atol=1e-5)
    index = torch.tensor([7, 0, 3, 4])
    gradients = []
    for size in (1, 4):
        parameter = model.module.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
        loss, accuracy = add_gradient(model, examples, index, batch_size=size)
        gradients.append(parameter.grad)
        parameter.grad = None
        assert loss == pytest.approx(together.loss[index].mean(), rel=1e-5)
        assert accuracy == pytest.approx(together.accuracy[index].mean())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    before = float(measure(model, examples).loss[index].mean())
    norm = float(gradients[0].square().sum())
    with torch.no_grad():  # and it points uphill: a small step against it lowers the loss by step·‖g‖²
        parameter.sub_(gradients[0], alpha=1e-3 / norm)
    after = float(measure(model, examples).loss[index].mean())
    assert before - after == pytest.approx(1e-3, rel=0.1)


def test_bad_input(model):
    t = [model.tokenizer]
    good = rows(4)
    with pytest.raises(InputError, match="objective is one of"):
        read_examples(good, t, objective="guess")
    with pytest.raises(InputError, match=r"label words are single tokens: .*'kdbfag' is 6 tokens"):
        read_examples([{"prompt": "abc=", "answer": "kdbfag"}], t, objective="labels", labels=("a", "kdbfag"))
    with pytest.raises(InputError, match=r"^prompt 1: the tokenizer has no token for 'é'"):  # no matter of the labels
        read_examples([{"prompt": "é=", "answer": "a"}], t, objective="labels", labels=("a", "b"))
    with pytest.raises(InputError, match="found none; texts without answers have the objective text"):
        label_words([read_prompts(["abc=", "abd="])])
    with pytest.raises(InputError, match="'c' is no label; they are a, b"):
        read_examples([{"prompt": "abc=", "answer": "c"}], t, objective="labels", labels=("a", "b"))
    with pytest.raises(InputError, match=r"2 to 64 of them; found 1: 'a'"):
        label_words([read_prompts([{"prompt": "abc=", "answer": "a"}])])
    with pytest.raises(InputError, match="2 of 3 prompts have no `answer`"):
        read_examples([{"prompt": "abc=", "answer": "a"}, "abc", "abd"], t)
    other = strings.tokenizer()
    other.backend_tokenizer.post_processor = None  # no <bos>
    with pytest.raises(InputError, match="read prompt 1 differently"):
        read_examples(good, [model.tokenizer, other])
    assert isinstance(read_examples(good, [model.tokenizer, strings.tokenizer(), None]), Examples)


def test_calibration_by_hand():
    curve, error = calibration([0.1, 0.15, 0.9, 0.95, 1.0, np.nan], [0, 1, 1, 0, 1, 1], bins=5)
    assert curve[0].tolist() == [0.125, 0.5, 2]
    np.testing.assert_allclose(curve[4], [0.95, 2 / 3, 3])
    assert np.isnan(curve[2, 0])
    assert error == pytest.approx((2 * 0.375 + 3 * (0.95 - 2 / 3)) / 5)
    assert calibration([1.0, 1.0], [1, 1])[1] == 0
    assert np.isnan(calibration([np.nan], [1])[1])
