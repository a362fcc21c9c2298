"""Configs: every fault at once, each with its path; what is dumped is what was loaded."""

import pytest

from diffusion import config

MINIMAL = "task: autoencoder\nname: x\ndata: {path: somewhere}\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return file

    return write


def test_all_faults_are_told_at_once(write):
    file = write(MINIMAL + "train: {steps: true, stepz: 4, precision: fp12, lr: -1}\nseed: 1.5\n")
    with pytest.raises(ValueError, match=r"run\.yaml") as error:
        config.load(file)
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    text = str(error.value)
    for part in (
        "train.steps",
        "train.stepz: unknown key; did you mean train.steps?",
        "train.precision",
        "train.lr",
        "seed",
    ):
        assert part in text


def test_a_number_in_scientific_notation_is_a_number(write):
    assert config.load(write(MINIMAL + "train: {lr: 1e-4}\n")).train.lr == 1e-4


def test_a_repeated_key_is_an_error(write):
    with pytest.raises(ValueError, match="'name' is given twice"):
        config.load(write(MINIMAL + "name: y\n"))


@pytest.mark.parametrize("override", ["train.lr=3e-4", "--train.lr=3e-4"])
def test_overrides(write, override):
    assert config.load(write(MINIMAL), [override]).train.lr == 3e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.lr", "key=value"), ("name.x=3", "not a section"), ("train.lrr=1", "did you mean train.lr?")],
)
def test_wrong_overrides(write, override, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        config.load(write(MINIMAL), [override])


def test_a_missing_file_suggests_its_neighbour(write):
    file = write(MINIMAL)
    with pytest.raises(ValueError, match=r"did you mean .*run\.yaml"):
        config.load(file.with_name("rum.yaml"))


def test_what_is_dumped_is_read_back(write):
    loaded = config.load(write(MINIMAL), ["seed=5", "task=text_to_image", "recipe.prompts=[a, b]"])
    assert config.load(write(config.dump(loaded))) == loaded


def test_every_field_is_documented():
    rows = config.documented_fields()
    assert len(rows) > 40
    assert all(doc and default for _, default, doc in rows)


# --- what would do nothing is refused ---------------------------------------------------------------------------------

DRAWS = {"task": "text_to_image", "name": "x", "data": {"path": "somewhere"}}
SEES = DRAWS | {"task": "autoencoder"}


def with_field(tree, name, value):
    """A tree with one more field at a dotted path."""
    head, _, rest = name.partition(".")
    return tree | {head: with_field(tree.get(head, {}), rest, value) if rest else value}


IDLE = [
    *((DRAWS, name, value, "task text_to_image") for name, value in (
        *(("data.crop", 64), ("model.vae", {}), ("model.train_encoder", False)),
        *((f"loss.{name}", 2.0) for name in ("l1", "mse", "gradient", "kl", "adversarial")),
        ("loss.adversarial_after", 5),
    )),
    *((SEES, name, value, "task autoencoder") for name, value in (
        *(("model.autoencoder", "x"), ("model.tokenizer", {}), ("model.text_encoder", {}), ("model.unet", {})),
        *(("model.train_text_encoder", True), ("model.lora", {}), ("model.words", [{"word": "zib", "start": "a"}])),
        *(("model.prediction", "sample"), ("loss.weighting", "min_snr"), ("loss.offset_noise", 0.1)),
        *(("data.captions.text", "x"), ("data.captions.dropout", 0.0), ("data.captions.templates", ["a {}"])),
        *(("data.prior", {"prompt": "a"}), ("recipe.steps", 5), ("recipe.prompts", ["a"])),
    )),
    (with_field(DRAWS, "model.lora", {}), "model.train_text_encoder", True, "model.lora"),
    (with_field(DRAWS, "model.words", [{"word": "zib", "start": "a"}]), "model.train_text_encoder", True, "words"),
    (with_field(DRAWS, "model.prediction", "flow"), "model.beta_schedule", "cosine", "prediction flow"),
    (with_field(DRAWS, "model.prediction", "flow"), "model.zero_terminal_snr", True, "prediction flow"),
    *((with_field(DRAWS, "data.path", "set-{0..3}.tar"), name, value, "shards") for name, value in (
        *(("data.captions.text", "x"), ("data.captions.source", "txt"), ("data.prior", {"prompt": "a"})),
        *(("data.balance", "base"), ("data.buckets", True)),
    )),
    (with_field(DRAWS, "train.auto_batch", True), "train.micro_batch", 2, "train.auto_batch"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "name", "value", "reason"), IDLE)
def test_a_field_that_would_do_nothing_is_refused(tree, name, value, reason):
    config.validate(tree)
    with pytest.raises(ValueError, match="has no effect") as error:
        config.validate(with_field(tree, name, value))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"config: {name}: has no effect with ")
    assert reason in line


def test_all_that_would_do_nothing_is_told_at_once_and_defaults_are_no_fault():
    tree = with_field(with_field(SEES, "recipe.steps", 5), "data.captions.trigger", "sks")
    with pytest.raises(ValueError, match="has no effect") as error:
        config.validate(tree)
    assert len(str(error.value).splitlines()) == 2
    config.validate(with_field(SEES, "data.captions", {"dropout": 0.1}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["zib", "zib"], "words.1.word: zib and zib would share the token zib"),
        (["<zib>", "zib"], "zib and <zib> would share the file zib.safetensors"),
        (["Zib", "zib"], "zib and Zib would share the file zib.safetensors"),
        (["zib", "zib_1"], "zib_1 and zib would share the token zib_1"),
        (["zib-a1111"], "zib-a1111 ends as the second file of a word does"),
    ],
)
def test_words_that_would_share_a_token_or_a_file_are_refused(words, message):
    listed = [{"word": word, "start": "cat", "vectors": 2} for word in words]
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        config.validate(with_field(DRAWS, "model.words", listed))
    config.validate(with_field(DRAWS, "model.words", [{"word": w, "start": "cat"} for w in ("zib", "zib_dog")]))


@pytest.mark.parametrize(
    ("name", "value"), [("seed", -1), ("seed", 2**63), ("train.betas", [0.9, 1.0]), ("train.betas", [0.9])]
)
def test_a_value_out_of_its_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"config: {name}"):
        config.validate(with_field(DRAWS, name, value))
    config.validate(with_field(DRAWS, "seed", 2**63 - 1))


def test_half_a_character_is_refused():
    with pytest.raises(ValueError, match=r"^config: a text of it holds half a character"):
        config.validate(with_field(DRAWS, "data.captions.text", "\ud83d"))
