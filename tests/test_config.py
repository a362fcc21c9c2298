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
    loaded = config.load(write(MINIMAL), ["seed=5", "recipe.prompts=[a, b]"])
    assert config.load(write(config.dump(loaded))) == loaded


def test_every_field_is_documented():
    rows = config.documented_fields()
    assert len(rows) > 40
    assert all(doc and default for _, default, doc in rows)
