"""The prompt language, and how such prompts are encoded: against hand-made numbers and the stock pipelines."""

import random
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch

from diffusion import prompts
from diffusion.models import embeddings, text
from diffusion.models.folder import load_model
from diffusion.prompts import Span, expand, literal, parse, read_wildcards
from families import CAPTIONS, FAMILIES, save, stock

ROOM = 22  # of the tiny families


def spans(prompt):
    return [(span.text, pytest.approx(span.weight)) for span in parse(prompt).parts[0]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [("", 1)]),
        ("a red cat", [("a red cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("((red)) cat", [("red", 1.21), (" cat", 1)]),
        ("a [red] cat", [("a ", 1), ("red", 1 / 1.1), (" cat", 1)]),
        ("(red: 1.3 ) cat", [("red", 1.3), (" cat", 1)]),
        ("(red:-.5)(blue:0)", [("red", -0.5), ("blue", 0)]),
        ("a ((red:1.5) cat) on (grass)", [("a ", 1), ("red", 1.65), (" cat", 1.1), (" on ", 1), ("grass", 1.1)]),
        ("(one [two) three]", [("one ", 1.1), ("two", 1), (" three", 1 / 1.1)]),  # the kinds may overlap
        ("(red)(cat)", [("redcat", 1.1)]),
        ("(red:1) cat", [("red cat", 1)]),
        ("so ((far", [("so ", 1), ("far", 1.21)]),
        ("a) stray] one:1.2)", [("a) stray] one:1.2)", 1)]),
        (r"\(red\) \[cat\] \\ \o/", [(r"(red) [cat] \ \o/", 1)]),
        (r"(\(red\):1.2)", [("(red)", 1.2)]),
        ("(16:9 ratio), 12:30", [("16:9 ratio", 1.1), (", 12:30", 1)]),
        ("()", [("", 1)]),
    ],
)
def test_emphasis_is_read_as_people_write_it(prompt, expected):
    assert spans(prompt) == expected
    assert parse(prompt).written == prompt


def test_break_separates_parts_and_keeps_the_weights_around_it():
    assert parse("a cat BREAK a dog").parts == ((Span("a cat", 1),), (Span("a dog", 1),))
    assert parse("(a cat\nBREAK\na dog:2)").parts == ((Span("a cat", 2),), (Span("a dog", 2),))
    assert parse("BREAKFAST, break").plain
    assert parse("a BREAK BREAK b").parts == ((Span("a", 1),), (Span("", 1),), (Span("b", 1),))
    assert parse("a BREAK").parts == ((Span("a", 1),),)  # as AUTOMATIC1111: there is nothing to separate
    assert not parse("a BREAK b").plain


def test_lora_tags_are_taken_out_of_the_text():
    found = parse("a (cat <lora:paper-cut:0.8>:1.2), wet <lora:ink> <lora:x y:-1>")
    assert found.loras == (("paper-cut", 0.8), ("ink", 1.0), ("x y", -1.0))
    assert found.parts == ((Span("a ", 1), Span("cat ", 1.2), Span(", wet", 1)),)
    assert parse("<lora:ink>") == prompts.Prompt("<lora:ink>", ((Span("", 1.0),),), (("ink", 1.0),))
    assert parse("a <lora> <cat>").parts == ((Span("a <lora> <cat>", 1),),)  # a learnt word may be called anything


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("(red:1.2.3)", "1.2.3"),
        ("(red:nan)", "nan"),
        ("(red:-inf)", "-inf"),
        ("(red:1e999)", "1e999"),
        ("(" * 8000 + "red", "inf"),
        ("<lora:>", "<lora:>"),
        ("<lora:ink", "<lora:ink"),
        ("<lora:ink:much>", "<lora:ink:much>"),
        ("<lora:ink:nan>", "<lora:ink:nan>"),
        ("<lora:ink:1:2>", "<lora:ink:1:2>"),
        ("a [cat:dog:0.5]", r"\[cat:dog:0.5\]"),
        ("a [cat:10]", r"\[cat:10\]"),
        ("a [red|blue] cat", r"\[red\|blue\]"),
    ],
)
def test_what_cannot_be_meant_is_named(prompt, named):
    with pytest.raises(ValueError, match=named):
        parse(prompt)


def test_a_literal_prompt_is_taken_as_it_stands():
    assert literal("(a) BREAK <lora:x>").parts == ((Span("(a) BREAK <lora:x>", 1.0),),)
    assert literal("").plain
    assert parse(r"a \[red|blue\] cat").plain


def test_nothing_but_a_value_error_ever_comes_of_a_prompt():
    draw, pieces = (
        random.Random(0),
        ["(", ")", "[", "]", "\\", ":", "1.2", "nan", " ", "BREAK", "<lora:", ">", "|", "a"],
    )
    for _ in range(5000):
        prompt = "".join(draw.choices(pieces, k=draw.randrange(12)))
        try:
            found = parse(prompt)
        except ValueError:
            continue
        assert found.written == prompt
        assert found.parts
        assert all(part for part in found.parts)
        for part in found.parts:
            assert all(one.weight != other.weight for one, other in pairwise(part))
            assert all(span.text for span in part) or part == (Span("", 1.0),)


def test_text_without_syntax_survives_to_the_letter():
    draw, letters = random.Random(1), "aB ,.:;<>/|{}_-'\"\n\té猫🙂09"
    for _ in range(2000):
        prompt = "".join(draw.choices(letters, k=draw.randrange(40)))
        assert parse(prompt) == literal(prompt)
        bracketed = f"({prompt}]\\[)"
        escaped = "".join(rf"\{c}" if c in "()[]\\" else c for c in bracketed)
        assert parse(escaped).parts == literal(bracketed).parts


WILDCARDS = {"colour": ["red", "blue"], "pet": ["{cat|dog}", "__colour__ fish"], "me": ["__me__"], "none": []}


def test_choices_take_every_option_about_as_often():
    found = [expand("{a|b|{c|d}}", 7, row, {}) for row in range(3000)]
    assert {option: round(found.count(option) / 3000, 1) for option in "abcd"} == {
        "a": 0.3,
        "b": 0.3,
        "c": 0.2,
        "d": 0.2,
    }
    assert {expand("__pet__", 7, row, WILDCARDS) for row in range(99)} == {"cat", "dog", "red fish", "blue fish"}
    assert {expand("x{|, wet}{one}{}", 7, row, {}) for row in range(20)} == {"xone", "x, wetone"}


def test_a_choice_knows_its_seed_its_row_and_its_place_alone():
    text = "{a|b|c|d} {a|b|c|d} {a|b|c|d}"
    assert expand(text, 1, 2, {}) == expand(text, 1, 2, {})
    assert len({expand(text, seed, row, {}) for seed, row in product(range(5), range(5))}) > 15
    assert len({row[0] == row[2] for row in (expand(text, 1, n, {}) for n in range(30))}) == 2
    for row in range(9):  # what is added at the end changes nothing before it
        assert expand(text + ", {wet|dry}", 1, row, {}).startswith(expand(text, 1, row, {}))
    assert [expand("{a|b|c|d}", 3, row, {}) for row in range(6)] == ["d", "c", "b", "c", "c", "d"]  # and never will


def test_escapes_and_a_function_of_wildcards():
    assert expand(r"\{a\|b\} {c\|d} | \__e_\_ \(f\) \\", 1, 0, {}) == r"{a|b} c|d | __e__ \(f\) \\"
    assert expand("a __b/c-1__, d__e", 1, 0, lambda name: [f"<{name}>"]) == "a <b/c-1>, d__e"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("__color__", "unknown wildcard 'color', must be one of .*; did you mean 'colour'"),
        ("__none__", "'none' has no lines"),
        ("__me__", "more than 16 deep at '__me__'"),
        ("a {b|c", "never closed"),
        ("a b|c}", "never opened"),
    ],
)
def test_a_choice_that_cannot_be_made_is_told(line, says):
    with pytest.raises(ValueError, match=says):
        expand(line, 1, 0, WILDCARDS)


def test_a_folder_of_wildcards(tmp_path):
    (tmp_path / "light").mkdir()
    (tmp_path / "colour.txt").write_text("\ufeff# warm\nred\n\n  orange \n", encoding="utf-8")
    (tmp_path / "light" / "day.txt").write_text("noon", encoding="utf-8")
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.md").write_text("no wildcard")
    (tmp_path / "lines.txt").write_text("a\u2028b\r\nc\n", newline="", encoding="utf-8")
    assert read_wildcards(tmp_path)["lines"] == ["a\u2028b", "c"], "only newlines end lines"
    (tmp_path / "lines.txt").unlink()
    found = read_wildcards(tmp_path)  # reads none of them yet, so that a broken one harms no other
    assert list(found) == ["broken", "colour", "light/day"]
    assert found["colour"] == ["red", "orange"]
    assert expand("__light/day__, __colour__", 1, 0, found) in {"noon, red", "noon, orange"}
    with pytest.raises(ValueError, match=r"broken\.txt cannot be read as UTF-8"):
        found["broken"]
    with pytest.raises(ValueError, match="is no folder of wildcards"):
        read_wildcards(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there are no wildcards"):
        expand("__colour__", 1, 0, {})


# --- what the encoders make of it


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A tiny model of every family."""
    shelf = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        save(family, shelf / family)
    return shelf


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def reader(length=24):
    return text.Tokenizers([text.train_tokenizer(CAPTIONS, vocab_size=600, max_length=length)])


def lengths(tokens):
    return [len(chunk) for chunk in tokens.ids[0]]


def stock_context(pipeline, prompt, clip_skip=None):
    found = pipeline.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, clip_skip=clip_skip
    )
    return {"context": found[0]} | ({"pooled": found[2]} if len(found) == 4 else {})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", ["", " ", "a photo of a red cat", "red " * ROOM])
def test_a_plain_prompt_is_encoded_bit_for_bit_as_in_training(shelf, family, prompt):
    model = load_model(shelf / family)
    expected = text.encode(model, text.tokenize(model, [prompt]))
    for way in (parse, literal):
        found = text.condition(model, text.read(model, way(prompt)))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_a_layer_is_counted_as_the_stock_pipelines_count_it(shelf, family, clip_skip):
    model, pipeline = load_model(shelf / family), stock(shelf / family)
    encoder = pipeline.text_encoder
    if not hasattr(encoder, "text_model"):  # where diffusers looks for the norm, and transformers 5 has it no more
        object.__setattr__(encoder, "text_model", encoder)
    expected = stock_context(pipeline, "a red cat", None if clip_skip == 1 else clip_skip - 1)
    found = text.condition(model, text.read(model, parse("a red cat")), clip_skip=clip_skip)
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] - expected[name]).abs().max() <= 1e-6
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"clip_skip {wrong} is not possible: this text encoder has 2 layers"):
            text.condition(model, text.read(model, parse("a red cat")), clip_skip=wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_are_encoded_alone_and_laid_end_to_end(shelf, family):
    model, pipeline = load_model(shelf / family), stock(shelf / family)
    chunks = ["blue " * ROOM, "red " * 7, "a photo of a cat"]
    tokens = text.read(model, parse(f"{chunks[0]} {chunks[1]} BREAK {chunks[2]}"), long=True)
    assert lengths(tokens) == [22, 7, 5]
    found = text.condition(model, tokens, chunks=4)
    expected = [stock_context(pipeline, chunk) for chunk in (*chunks, "")]
    context = torch.cat([one["context"] for one in expected], dim=1)
    assert found["context"].shape == (1, 4 * 24, context.shape[-1])
    assert (found["context"] - context).abs().max() <= 1e-6
    if family == "sdxl":
        assert (found["pooled"] - expected[0]["pooled"]).abs().max() <= 1e-6


def test_the_empty_prompt_of_sdxl_is_zeros_in_every_chunk_and_an_empty_chunk_is_not(shelf):
    model = load_model(shelf / "sdxl")
    blank = text.condition(model, text.read(model, parse("")), chunks=2)
    assert blank["context"].shape == (1, 48, 64)
    assert not any(value.any() for value in blank.values())
    padded = text.condition(model, text.read(model, parse("red cat")), chunks=2)["context"]
    assert padded[:, 24:].abs().min() > 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("red " * 30, [22, 8]),
        ("red " * 10 + ", " + "red " * 20, [11, 20]),  # after the comma
        ("red , " + "red " * 29, [22, 9]),  # not so far back
        ("red " * 21 + ", " + "red " * 5, [22, 5]),
        ("red " * 10 + ", " + "red " * 11 + ", red", [22, 2]),  # a comma itself begins the next
        ("red " * 5 + ", " + "red " * 5 + ", " + "red " * 30, [12, 22, 8]),  # the last one
        ("red BREAK " + "red " * 23 + "BREAK BREAK red", [1, 22, 1, 0, 1]),
    ],
)
def test_chunks_end_where_people_expect(prompt, expected):
    assert lengths(text.read(reader(), parse(prompt), long=True)) == expected


def test_clip_splits_what_is_long_and_other_encoders_refuse_it():
    tokens = text.read(reader(77), parse("(red:1.5) " + "blue " * 80))
    assert lengths(tokens) == [75, 6]
    assert tokens.weights[0][0][:2] == [1.5, 1]
    with pytest.raises(
        ValueError, match=r"23 tokens long, but this text encoder reads 22: shorten '\(red\) red"
    ) as ours:
        text.read(reader(), parse("(red) " + "red " * 22))
    assert str(ours.value).endswith(f"it would end after {' '.join(['red'] * 22)!r}")
    with pytest.raises(ValueError, match="23 tokens long") as same:
        text.tokenize(reader(), ["red " * 23])
    with pytest.raises(ValueError, match="23 tokens long") as here:
        text.read(reader(), literal("red " * 23))
    assert str(here.value) == str(same.value)
    assert lengths(text.read(reader(), parse("red " * 22 + "BREAK red"))) == [22, 1]  # that was asked for


def test_tokenizers_that_disagree_have_the_same_number_of_chunks():
    two = text.Tokenizers([*reader().tokenizers, *reader(14).tokenizers])
    tokens = text.read(two, parse("red " * 20 + "BREAK blue"), long=True)
    assert [[len(chunk) for chunk in chunks] for chunks in tokens.ids] == [[20, 0, 1], [12, 8, 1]]
    assert tokens.chunks == 3


def test_a_learnt_word_keeps_together_and_may_be_emphasised(shelf):
    model = load_model(shelf / "sd1")
    embeddings.add(model.tokenizer, model.text_encoder, {"<me>": "cat"}, {"<me>": 3})
    word = model.tokenizer.convert_tokens_to_ids(["<me>", "<me>_1", "<me>_2"])
    tokens = text.read(model, parse("red " * 20 + "(<me>:1.5), blue"), long=True)
    assert lengths(tokens) == [20, 5]
    assert tokens.ids[0][1][:3] == word
    assert tokens.weights[0][1] == [1.5, 1.5, 1.5, 1, 1]
    plain = text.encode(model, text.tokenize(model, ["a photo of <me>"]))["context"]
    assert torch.equal(text.condition(model, text.read(model, parse("a photo of <me>")))["context"], plain)
    (long,) = reader().tokenizers
    long.add_tokens(["<it>", *(f"<it>_{n}" for n in range(1, 30))])
    assert lengths(text.read(text.Tokenizers([long]), parse("red <it>"), long=True)) == [1, 22, 8]


def test_emphasis_multiplies_tokens_and_keeps_the_mean():
    (tokenizer,) = reader(5).tokenizers
    output = SimpleNamespace(last_hidden_state=torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]]]))

    def encoder(_):
        return output

    encoder.device, encoder.config = "cpu", SimpleNamespace(num_hidden_layers=1)
    parts = SimpleNamespace(tokenizers=[tokenizer], text_encoders=[encoder], zero_empty=False)
    found = text.condition(parts, text.read(parts, parse("(red:2) (cat:0.5) ")))["context"].flatten()
    by_hand = torch.tensor([1.0, 4.0, 1.5, 4.0, 5.0]) * 15 / 15.5  # start, red, cat, end, padding
    assert torch.allclose(found, by_hand)
    assert torch.equal(text.condition(parts, text.read(parts, parse("(red:1)")))["context"], output.last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_emphasis_touches_its_chunk_alone_and_each_encoder_by_itself(shelf, family):
    model, pipeline = load_model(shelf / family), stock(shelf / family)
    found = text.condition(model, text.read(model, parse("a (red:1.5) cat BREAK blue boat")))
    first, second = stock_context(pipeline, "a red cat"), stock_context(pipeline, "blue boat")
    expected = []
    for z in first["context"].split(32, dim=-1):
        weighed = z.clone()
        weighed[:, 2] *= 1.5
        expected.append(weighed * z.mean() / weighed.mean())
    assert torch.allclose(found["context"][:, :24], torch.cat(expected, dim=-1), rtol=1e-4, atol=1e-5)
    assert torch.allclose(found["context"][:, 24:], second["context"], atol=1e-6)
    if family == "sdxl":
        assert torch.allclose(found["pooled"], first["pooled"], atol=1e-6)


def test_a_dry_run_tells_where_chunks_end():
    assert text.count_line(reader(), parse("a (red) cat")) == "3 of 22 tokens"
    line = text.count_line(reader(), parse("red " * 20 + "boat, cat " + "BREAK BREAK blue house"), long=True)
    assert line == "25 tokens in 4 chunks of 22: 22 to 'red boat ,', 1 to 'cat', 0, 2 to 'blue house'"
