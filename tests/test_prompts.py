"""Prompt files, their tokens, and where answers are read, with tokenizers of every kind that changes the answer."""

import json
import re
import string
from pathlib import Path

import pytest
import torch

from finetune_lens import zoo
from finetune_lens.errors import InputError
from finetune_lens.prompts import PROBES, Prompt, encode, printer, read_prompts, require_alignment, same_tokenizer

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260k"
WORDS = "The capital of France is Paris . Germany Berlin Rome Italy a big city and the river"
CHAT = (
    "<bos><|system|>The capital of France is<|user|>{{ messages[0]['content'] | trim }}<|end|>"
    "{% if add_generation_prompt %}<|model|>{% endif %}"
)


def bpe(*, front=(), end=(), extra=(), template=None):
    """Byte-level BPE, in which a space belongs to the word after it; every word of WORDS is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|end|>", "<|model|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([" " + WORDS, *WORDS.split()] * 3, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single=[*front, "$A", *end], special_tokens=[(t, raw.token_to_id(t)) for t in ("<bos>", "<eos>")]
    )
    raw.add_tokens(list(extra))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=template
    )


def words(unknown="<unk>"):
    """A token a word, and one for everything else."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS.split()])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>")


def pieces():
    """WordPiece: a token says whether it continues a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "city", ".", "is", "##is", "c", "##i", "ci", "##s", "cis"]
    raw = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def letters():
    """Slow: Python code that knows nothing of offsets; a token a letter, `<eos>` at the end."""
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        table = {t: i for i, t in enumerate(["<unk>", "<eos>", "<u>", "<m>", *string.ascii_letters, " ", "."])}  # noqa: RUF012

        def get_vocab(self):
            return dict(self.table)

        @property
        def vocab_size(self):
            return len(self.table)

        def _tokenize(self, text, **_):
            return list(text)

        def _convert_token_to_id(self, token):
            return self.table.get(token, 0)

        def _convert_id_to_token(self, index):
            return list(self.table)[index]

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

        def build_inputs_with_special_tokens(self, one, other=None):
            return [*one, 1]

    return Letters(
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens=["<u>", "<m>"],
        chat_template="<u>{{ messages[0]['content'] }}<m>",
    )


PARIS = Prompt("The capital of France is", " Paris", (" Berlin",), "The capital of Germany is", "paris")
ROME = Prompt("The big capital of Italy is", " Rome", (" Paris", " Berlin"), "The big river of Italy is", "rome")


# The file


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_a_file_is_read_as_it_stands(tmp_path):
    path = write(
        tmp_path / "prompts.jsonl",
        "\ufeff",
        {"prompt": " a ", "answer": " b", "topic": "x", "weight": 2},
        "\n",
        {"prompt": "c", "answer": ["d", "e"], "wrong": "f", "corrupt": "C", "id": "own"},
        {"prompt": "line\u2028separator", "wrong": None, "id": 7},
    )
    one, two, three = read_prompts(path)
    assert one == Prompt(" a ", (" b",), id="1", fields={"topic": "x", "weight": 2})
    assert two == Prompt("c", ("d", "e"), ("f",), "C", "own")
    assert three == Prompt("line\u2028separator", id="7")
    assert read_prompts(str(path), limit=2) == [one, two]


def test_prompts_from_python():
    made = Prompt("made", answer=" x")
    assert made.answer == (" x",), "not one answer a letter"
    found = read_prompts(iter(["text", made, {"prompt": "object", "id": "o"}]))
    assert [p.id for p in found] == ["1", "2", "o"]
    assert [p.prompt for p in found] == ["text", "made", "object"]
    assert found[1].answer == (" x",)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{prompt: 1}\n", "line 2 is not JSON"),
        ("[" * 100_000 + "\n", "line 2 is not JSON"),
        ("[1]\n", r"line 2: expected an object .*found \[1\]"),
        ('"text"\n', "line 2: expected an object .*found a string"),
        ({"answer": "x", "text": "y"}, "line 2: no `prompt` among answer, text"),
        ({}, "line 2: no `prompt` among its fields"),
        ({"prompt": ""}, "line 2: `prompt`: expected text that is not empty, found ''"),
        ({"prompt": None}, "line 2: `prompt`: expected text that is not empty, found None"),
        ({"prompt": ["x"]}, "line 2: `prompt`: expected text"),
        ({"prompt": "x", "answer": 5}, "line 2: `answer`: expected a string or a list of strings, found 5"),
        ({"prompt": "x", "answer": ["y", 5]}, "line 2: `answer`: expected text that is not empty, found 5"),
        ({"prompt": "x", "answer": ""}, "line 2: `answer`: expected text that is not empty"),
        ({"prompt": "x", "wrong": {"y": 1}}, "line 2: `wrong`: expected a string or a list"),
        ({"prompt": "x", "corrupt": ""}, "line 2: `corrupt`: expected text"),
        ({"prompt": "x", "answer": ["y", "z"], "wrong": "z"}, "line 2: 'z' is both an `answer` and `wrong`"),
        ({"prompt": "x", "id": True}, "line 2: `id`: expected text or a whole number, found True"),
        ({"prompt": "x", "id": ""}, "line 2: `id`: expected"),
        ({"prompt": "x", "id": "1"}, "line 2: the id '1' is that of line 1"),
        ('{"prompt": "\\ud800"}\n', "line 2: `prompt`: .*not valid Unicode"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, says):
    path = write(tmp_path / "prompts.jsonl", {"prompt": "good"}, line)
    with pytest.raises(InputError, match=says) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500
    assert len(read_prompts(path, limit=1)) == 1, "what is not read is not looked at"


def test_a_file_that_is_not_prompts_is_refused(tmp_path):
    (tmp_path / "binary.jsonl").write_bytes(b'{"prompt": "\xff\xfe\x00"}')
    (tmp_path / "wide.jsonl").write_bytes('{"prompt": "x"}'.encode("utf-16-le"))
    for name, says in {
        "binary.jsonl": "line 1 is not UTF-8",
        "wide.jsonl": "line 1 is not UTF-8",
        write(tmp_path / "empty.jsonl", "\n \n").name: "holds no prompts",
        write(tmp_path / "prompts.txt", "text\n").name: r"named \*.jsonl with one object a line",
        "absent.jsonl": "is not there",
    }.items():
        with pytest.raises(InputError, match=says):
            read_prompts(tmp_path / name)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        read_prompts(tmp_path / "folder.jsonl")
    for source in (5, None, {"prompt": "x"}, b"x", Prompt("x")):
        with pytest.raises(InputError, match="expected the path"):
            read_prompts(source)
    with pytest.raises(InputError, match="the list holds no prompts"):
        read_prompts([])
    with pytest.raises(InputError, match="prompt 2: expected an object"):
        read_prompts(["x", 5])
    with pytest.raises(InputError, match="prompt 2: the id 'paris' is that of prompt 1"):
        read_prompts([PARIS, PARIS])
    with pytest.raises(InputError, match="limit"):
        read_prompts(["x"], limit=0)


# Tokens


def test_tokens_and_the_place_of_the_answer():
    tokenizer = bpe(front=["<bos>"])
    found = encode([PARIS, ROME], tokenizer)
    assert found.tokens == [
        ["<bos>", "The", " capital", " of", " France", " is"],
        ["<bos>", "The", " big", " capital", " of", " Italy", " is"],
    ]
    token = tokenizer.get_vocab().__getitem__
    assert found.ids[0].tolist() == [token("<pad>"), *tokenizer("The capital of France is").input_ids]
    assert found.mask.tolist() == [[False] + [True] * 6, [True] * 7]
    assert found.position_ids.tolist() == [[0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6]]
    assert found.read_at.tolist() == [[6], [6]]
    assert found.answers.tolist() == [[[token("ĠParis")]], [[token("ĠRome")]]]
    assert found.wrongs.tolist() == [[token("ĠBerlin"), -1], [token("ĠParis"), token("ĠBerlin")]]
    assert torch.equal(found.prompt_columns, found.mask)
    assert found.text_columns.tolist() == [[False] * 2 + [True] * 5, [False] + [True] * 6]
    assert found.ids.dtype == found.read_at.dtype == found.answers.dtype == found.wrongs.dtype == torch.int64


def test_the_side_of_the_padding_moves_columns_and_nothing_else():
    tokenizer = bpe(front=["<bos>"])
    left, right = (encode([PARIS, ROME], tokenizer, padding=side, length=9) for side in ("left", "right"))
    assert left.ids.shape == right.ids.shape == (2, 9)
    assert right.read_at.tolist() == [[5], [6]]
    for part in ("ids", "position_ids", "text_columns", "prompt_columns"):
        for row in range(2):
            a, b = (getattr(side, part)[row][side.mask[row]].tolist() for side in (left, right))
            assert a == b, part
    assert left.tokens == right.tokens
    with pytest.raises(InputError, match=r"length: 6 columns do not hold the 7 tokens of prompt rome"):
        encode([PARIS, ROME], tokenizer, length=6)
    with pytest.raises(InputError, match="padding"):
        encode([PARIS], tokenizer, padding="middle")


def test_padding_does_not_change_what_a_model_says():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = zoo.path("strings") / "base"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = [Prompt("<copy>gafbdz=", "g"), Prompt("<reverse>gafb=", "b"), Prompt("=", "a")]
    alone = []
    for prompt in asked:
        ids = tokenizer(prompt.prompt, return_tensors="pt").input_ids
        alone.append(model(ids).logits[0, -1].detach())
    for side in ("left", "right"):
        found = encode(asked, tokenizer, padding=side)
        logits = model(found.ids, attention_mask=found.mask.long(), position_ids=found.position_ids).logits
        read = logits[torch.arange(3), found.read_at[:, 0]].detach()
        assert torch.allclose(read, torch.stack(alone), atol=1e-4), side
    assert [alone[i].argmax() == found.answers[i, 0, 0] for i in range(2)] == [True, False], (
        "it copies; 4 letters are new"
    )


@pytest.mark.parametrize(
    ("front", "end"), [([], []), (["<bos>"], []), ([], ["<eos>"]), (["<bos>"], ["<eos>"]), (["<eos>"], ["<eos>"])]
)
def test_special_tokens_stand_in_front_and_never_at_the_end(front, end):
    prompts = [PARIS, Prompt("<eos>a<eos>", " Rome")]
    found = encode(prompts, bpe(front=front, end=end), whole=True)
    assert found.tokens[0] == [*front, "The", " capital", " of", " France", " is"]
    assert found.tokens[1] == [*front, "<eos>", "a", "<eos>"], "what the user wrote is kept"
    assert [int(row.sum()) for row in found.text_columns] == [5, 3]


def test_a_text_of_special_tokens_does_not_hide_where_others_are_added():
    found = encode([Prompt("<eos>", " a"), Prompt("<bos>a", " a")], bpe(front=["<bos>"], end=["<eos>"]))
    assert found.tokens == [["<bos>", "<eos>"], ["<bos>", "<bos>", "a"]]


def test_alternatives_are_kept_once_each():
    found = encode([Prompt("The city", (" Paris", " Rome")), Prompt("The", (" city",))], bpe())
    token = bpe().get_vocab().__getitem__
    assert found.answers.tolist() == [[[token("ĠParis"), token("ĠRome")]], [[token("Ġcity"), -1]]]
    assert found.wrongs.shape == (2, 0)
    assert encode([Prompt("The ", ("city", " city"), ("is", " is"))], words()).answers.shape == (1, 1, 1), "one token"
    assert encode([Prompt("The ", ("city",), ("is", " is"))], words()).wrongs.shape == (1, 1)


def test_a_token_across_the_end_of_the_prompt_is_refused():
    with pytest.raises(InputError, match=r"prompt 1: no token begins where 'Paris' does") as caught:
        encode([Prompt("The capital of France is ", "Paris")], bpe())
    assert "' France' + ' is' + ' '" in str(caught.value)
    assert "' France' + ' is' + ' Paris'" in str(caught.value)
    assert "a space between the two" in str(caught.value)
    with pytest.raises(InputError, match=r"prompt 1: no token begins where 'y' does"):
        encode([Prompt("The cit", "y")], bpe())
    with pytest.raises(InputError, match=r"no token begins where ' ' does"):
        encode([Prompt("The city", " ")], words())
    with pytest.raises(InputError, match=r"1 of 2 prompts have a text of which the tokenizer leaves nothing: prompt 2"):
        encode([Prompt("The", " city"), Prompt("  ", "city")], words())


def test_an_answer_of_several_tokens_is_refused_unless_scored_whole():
    tokenizer = bpe(front=["<bos>"])
    prompts = [Prompt("The city", " Rome is a city", " Paris is a river"), Prompt("The big river and the", " river")]
    with pytest.raises(
        InputError, match=r"prompt 1: the answer ' Rome is a city' is 4 tokens, ' Rome' \+ .*whole_answer=True"
    ):
        encode(prompts, tokenizer)
    token = tokenizer.get_vocab().__getitem__
    expected = [token(t) for t in ("ĠRome", "Ġis", "Ġa", "Ġcity")]
    for side in ("left", "right"):
        found = encode(prompts, tokenizer, whole=True, padding=side)
        assert found.answers.tolist() == [[[t] for t in expected], [[token("Ġriver")], [-1], [-1], [-1]]]
        assert found.wrongs.shape == (2, 0)
        assert found.tokens[0] == ["<bos>", "The", " city", " Rome", " is", " a"], "the last is only predicted"
        assert found.ids[0, found.read_at[0]].tolist() == [token("Ġcity"), *expected[:-1]]
        assert found.ids[1, found.read_at[1]].tolist() == [token("Ġthe")] * 4
        assert found.prompt_columns.sum(1).tolist() == [3, 6]
        assert found.text_columns.sum(1).tolist() == [2, 5]
        assert found.mask.sum(1).tolist() == [6, 6]
    with pytest.raises(InputError, match="1 of 1 prompts have more than one `answer`"):
        encode([Prompt("The", (" city", " river"))], tokenizer, whole=True)


def test_the_summed_log_probability_of_a_whole_answer_is_that_of_the_joint_text():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = zoo.path("strings") / "base"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = Prompt("<reverse>gafbdz=", "zdbfag")
    found = encode([prompt, Prompt("<copy>gafbdz=", "ga")], tokenizer, whole=True, padding="left")
    logits = model(found.ids, attention_mask=found.mask.long(), position_ids=found.position_ids).logits.log_softmax(-1)
    steps = logits[0, found.read_at[0]].gather(1, found.answers[0])
    ids = tokenizer(prompt.prompt + prompt.answer[0], return_tensors="pt").input_ids
    joint = model(ids[:, :-1]).logits.log_softmax(-1)[0].gather(1, ids[0, 1:, None])
    assert torch.allclose(steps.sum(), joint[-6:].sum(), atol=1e-4)
    assert steps.sum() > -1, "it knows the answer"


def test_wrong_answers_must_be_told_apart_by_their_first_token():
    with pytest.raises(
        InputError, match=r"prompt 1: the answer ' city' and the wrong one ' city is' begin with the same"
    ):
        encode([Prompt("The", " city", " city is")], bpe())
    found = encode([Prompt("The", " city", " river is")], bpe())
    assert found.wrongs.tolist() == [[bpe().get_vocab()["Ġriver"]]]
    with pytest.raises(InputError, match="both an `answer` and `wrong`"):
        Prompt("The", (" city",), (" city",))


def test_prompts_without_answers():
    with pytest.raises(InputError, match="2 of 3 prompts have no `answer`: prompt 1, prompt 3"):
        encode([Prompt("The"), PARIS, Prompt("The city")], bpe())
    with pytest.raises(InputError, match="no prompts to encode"):
        encode([], bpe())
    for whole in (False, True):
        found = encode([Prompt("The"), Prompt("The city")], bpe(), need_answer=False, whole=whole)
        assert found.answers.shape == (2, 1, 0)
        assert found.wrongs.shape == (2, 0)
        assert found.read_at.tolist() == [[1], [1]]
        mixed = encode([Prompt("The"), PARIS], bpe(), need_answer=False, whole=whole)
        assert mixed.answers.tolist() == [[[-1]], [[bpe().get_vocab()["ĠParis"]]]]


def test_the_counterfactual_keeps_the_answers():
    tokenizer = bpe(front=["<bos>"])
    clean, corrupt = (encode([PARIS, ROME], tokenizer, corrupt=side) for side in (False, True))
    assert corrupt.tokens[0] == ["<bos>", "The", " capital", " of", " Germany", " is"]
    assert torch.equal(corrupt.answers, clean.answers)
    assert torch.equal(corrupt.wrongs, clean.wrongs)
    with pytest.raises(InputError, match="1 of 2 prompts have no `corrupt` text: prompt 2"):
        encode([PARIS, Prompt("The", " city")], tokenizer, corrupt=True)
    with pytest.raises(InputError, match="prompt 1: no token begins where 'is' does"):
        encode([Prompt("city.", "is", corrupt="city.c")], pieces(), corrupt=True)
    with pytest.raises(
        InputError, match=r"prompt 1: its answers are other tokens .*'city\.'.*'city'; let both texts end"
    ):
        encode([Prompt("city.", "is", corrupt="city")], pieces(), corrupt=True)


def test_what_the_vocabulary_does_not_hold_is_named():
    for prompt, piece in [
        (Prompt("The capital of Spain is", " Paris"), "Spain"),
        (Prompt("The capital of France is", (" Paris", " Lutetia")), "Lutetia"),
        (Prompt("The capital of France is", " Paris", " Lyon"), "Lyon"),
    ]:
        with pytest.raises(InputError, match=f"prompt 2: the tokenizer has no token for '{piece}' in 'The capital"):
            encode([PARIS, prompt], words())
    assert encode([Prompt("The <unk> is", " a")], words()).ids[0, 1] == 0, "a user may write the unknown token"
    with pytest.raises(InputError, match="no token for 'Spain'"):
        encode([Prompt("The <unk> of Spain", " is")], words())
    with pytest.raises(InputError, match="prompt 2: the tokenizer has no token for 'Spain' in 'The"):
        encode([PARIS, Prompt("The capital of Spain is", " Paris")], words(unknown="[none]"))
    with pytest.raises(InputError, match="prompt 1: the tokenizer has no token for 'é' in"):
        encode([Prompt("caf" + "é", "a")], letters())
    from transformers import AutoTokenizer

    strings = AutoTokenizer.from_pretrained(zoo.path("strings") / "base")
    with pytest.raises(InputError, match="prompt 1: the tokenizer has no token for 'Z' in '<flip>abZ='"):
        encode([Prompt("<flip>abZ=", "a")], strings)


# Chat templates


def test_a_chat_template_is_put_around_the_text():
    tokenizer = bpe(front=["<bos>"], end=["<eos>"], template=CHAT)
    prompts = [Prompt("The capital of France is", "Paris"), Prompt(" The city ", "Rome"), Prompt("<bos>", "Rome")]
    left, right = (encode(prompts, tokenizer, template=True, padding=side) for side in ("left", "right"))
    system = ["<bos>", "<|system|>", "The", " capital", " of", " France", " is", "<|user|>"]
    assert left.tokens[0] == [*system, "The", " capital", " of", " France", " is", "<|end|>", "<|model|>"]
    assert left.tokens[1] == [*system, "The", " city", "<|end|>", "<|model|>"]
    texts = [["The", " capital", " of", " France", " is"], ["The", " city"], ["<bos>"]]
    for found in (left, right):
        for row, text in enumerate(texts):
            own = found.text_columns[row]
            assert [tokenizer.decode([i]) for i in found.ids[row, own].tolist()] == text
            assert int(own.nonzero()[0]) == int(found.mask[row].nonzero()[0]) + len(system)
        assert torch.equal(found.prompt_columns, found.mask)
        assert all(tokenizer.decode(found.ids[row, found.read_at[row]]) == "<|model|>" for row in range(3))
    assert left.answers[:, 0, 0].tolist() == [tokenizer.get_vocab()[t] for t in ("Paris", "Rome", "Rome")]
    whole = encode([Prompt("The city", "Rome is")], tokenizer, template=True, whole=True)
    assert whole.tokens[0][-3:] == ["<|end|>", "<|model|>", "Rome"]
    assert whole.prompt_columns.sum() == whole.mask.sum() - 1
    assert whole.text_columns.sum() == 2


def test_white_space_of_the_text_is_text():
    from tokenizers import processors

    tokenizer = bpe(template="<|user|>is {{ messages[0]['content'] }}<|model|>")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2 has it
    for text in ("  The \n  city", "  city  ", " ", " The ☃\t"):
        found = encode([Prompt(text, "Rome")], tokenizer, template=True)
        assert tokenizer.decode(found.ids[0, found.text_columns[0]]) == text


def test_templates_that_do_not_do():
    with pytest.raises(InputError, match="has no chat template"):
        encode([PARIS], bpe(), template=True)
    for template, says in {
        "{{ raise_exception('system first') }}": "fails on a user's message: system first",
        "nothing": "does not hold 'The city' in one piece: 'nothing'",
        "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}": "does not hold",
        "<|user|>{{ messages[0]['content'] | upper }}<|model|>": "does not hold 'The city' in one piece: .*THE CITY",
        "{{ messages[0]['content'] }}{{ messages[0]['content'] | length }}": "does not hold",
        "{{ messages[0]['content'] | replace('city', 'town') }}": "does not hold 'The city' in one piece: 'The town'",
    }.items():
        with pytest.raises(InputError, match=says):
            encode([Prompt("The city", " Rome")], bpe(template=template), template=True)


def test_slow_tokenizers():
    tokenizer = letters()
    assert tokenizer("ab").input_ids[-1] == 1, "or it appends nothing"
    found = encode([Prompt("a b", "c"), Prompt("a", "d")], tokenizer)
    assert found.tokens == [["a", " ", "b"], ["a"]]
    assert torch.equal(found.text_columns, found.mask)
    found = encode([Prompt("a b", "c")], tokenizer, template=True)
    assert found.tokens == [["<u>", "a", " ", "b", "<m>"]]
    assert found.text_columns.tolist() == [[False, True, True, True, False]]
    assert found.ids.shape == found.mask.shape == (1, 5)


def test_a_sentencepiece_tokenizer():
    if not STORIES.exists():
        pytest.skip("no real model here")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    found = encode([Prompt("Once upon a", " time"), Prompt("Lily wanted to", " play")], tokenizer)
    assert found.ids[0, found.mask[0]].tolist() == tokenizer("Once upon a").input_ids
    assert tokenizer.convert_ids_to_tokens(found.answers[:, 0, 0]) == ["▁time", "▁play"]
    with pytest.raises(InputError, match="no token begins where 'time' does"):
        encode([Prompt("Once upon a ", "time")], tokenizer)


# The whole batch


def test_rows_of_a_batch():
    found = encode([PARIS, ROME, Prompt("The", " city")], bpe())
    for index in (slice(1, 3), [1, 2], torch.tensor([1, 2]), torch.tensor([False, True, True])):
        some = found.rows(index)
        assert len(some) == 2
        for name in ("ids", "mask", "read_at", "answers", "wrongs", "prompt_columns", "text_columns", "position_ids"):
            assert torch.equal(getattr(some, name), getattr(found, name)[1:]), name
        assert some.tokens == found.tokens[1:]
    assert found.rows(2).ids.tolist() == found.ids[2:].tolist()
    assert found.rows([2, 0]).tokens == [found.tokens[2], found.tokens[0]]


def test_prompts_that_do_not_align_are_refused():
    tokenizer = bpe(front=["<bos>"])
    prompts = [PARIS, ROME, PARIS, Prompt("The", " city")]
    found = encode(prompts, tokenizer)
    says = r"prompts have 2 to 7 tokens \(paris: 6, rome: 7, 4: 2\); pass align='left' or 'right' \(--align\)"
    with pytest.raises(InputError, match=says):
        require_alignment(prompts, found)
    require_alignment(prompts, found, how="left")
    require_alignment(prompts, found, found, how="right")
    with pytest.raises(InputError, match="align: expected"):
        require_alignment(prompts, found, how="centre")
    clean, corrupt = (encode([PARIS], tokenizer, corrupt=side) for side in (False, True))
    require_alignment([PARIS], clean, corrupt)
    longer = Prompt("The capital of France is", " Paris", corrupt="The big capital of France is", id="own")
    clean, corrupt = (encode([PARIS, longer], tokenizer, corrupt=side) for side in (False, True))
    with pytest.raises(InputError, match="prompt own has 6 tokens, its `corrupt` text 7; pass align"):
        require_alignment([PARIS, longer], clean, corrupt)
    whole = [Prompt("The city", " is"), Prompt("The river", " is a city")]
    require_alignment(whole, encode(whole, tokenizer, whole=True))


# Two tokenizers


def test_a_tokenizer_is_the_same_as_itself():
    assert same_tokenizer(bpe(), bpe()) == []
    assert same_tokenizer(words(unknown="[none]"), words(unknown="[none]")) == [], (
        "not even one that reads none of the texts"
    )
    assert same_tokenizer(letters(), letters()) == []
    assert same_tokenizer(bpe(), bpe(extra=["<new>"])) == [], "a token at the end changes nothing for the others"


def test_what_differs_between_tokenizers_is_said():
    def only(found, says):
        assert len(found) == 1, found
        assert re.search(says, found[0]), found

    only(same_tokenizer(bpe(), bpe(front=["<bos>"])), r"special tokens added to a text: \[\] against \[1\]")
    only(same_tokenizer(bpe(), bpe(template=CHAT)), "chat template: none against another")
    only(same_tokenizer(bpe(template="x"), bpe(template=CHAT)), "chat template: one against another")
    other = bpe()
    other.pad_token = "<eos>"
    only(same_tokenizer(bpe(), other), "pad token: id 0 against 2")

    from tokenizers import normalizers

    lower = bpe()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = same_tokenizer(bpe(), lower)
    assert [line.split(": tokens [")[0] for line in found] == [repr(t) for t in PROBES if t != t.lower()]


def test_vocabularies_are_compared_by_id():
    from tokenizers import Tokenizer

    def changed(edit):
        tokenizer = words()
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        edit(state["model"]["vocab"])
        return type(tokenizer)(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>", eos_token="<eos>"
        )

    def swap(vocabulary):
        vocabulary["Paris"], vocabulary["Rome"] = vocabulary["Rome"], vocabulary["Paris"]

    def rename(vocabulary):
        vocabulary["Madrid"] = vocabulary.pop("Paris")

    def move(vocabulary):
        vocabulary["Paris"] = 500

    at = words().get_vocab()["Paris"]
    for edit, count, shown in [
        (swap, 2, f"{at}: 'Paris' against 'Rome'"),
        (rename, 1, f"{at}: 'Paris' against 'Madrid'"),
        (move, 1, f"{at}: 'Paris' against None"),
    ]:
        [line] = same_tokenizer(words(), changed(edit))
        assert f"vocabulary: {count} ids" in line
        assert shown in line


def test_importing_imports_no_torch(in_new_process):
    code = "import sys, finetune_lens.prompts, finetune_lens.stats; print({'torch', 'transformers'} & {*sys.modules})"
    assert in_new_process("-c", code).stdout.strip() == "set()"


def test_tokens_of_sentencepiece_keep_their_space():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"▁a": 0, "b": 1, "▁": 2, "?": 3}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    show = printer(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?"))
    assert [show(i) for i in range(3)] == [" a", "b", " "]
