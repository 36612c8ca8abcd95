"""Which class a picture is of: no layout, name, link or list may shift a label without a word."""

from pathlib import Path

import pytest
import webdataset

from data.image_folder import open_image_folder
from data.shards.index_store import IndexStore
from tests.data.bad_files import encoded
from trainer.config.sections import EvalSet
from trainer.errors import ConfigError
from trainer.evaluation.classes import read_class_names, read_lines
from trainer.evaluation.evaluation import Embedded, labels_of
from trainer.evaluation.results import SetResult
from trainer.evaluation.robustness import read_baselines
from trainer.evaluation.sets import EvalData, open_eval_set

COLOURS = ["red", "green", "blue", "cyan", "pink", "grey", "teal", "lime", "gold", "navy", "plum", "rust"]
PROBE = ["zero_shot", "linear_probe"]


def folders(root: Path, names: list[str], pictures: int = 1) -> Path:
    """Class folders of files that are never opened."""
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(pictures):
            (root / name / f"{number}.png").touch()
    return root


def listing(path: Path, names: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def shards(folder: Path, labels: list[str]) -> Path:
    folder.mkdir(parents=True)
    with webdataset.TarWriter(str(folder / "0.tar")) as sink:
        for number, label in enumerate(labels):
            sink.write({"__key__": f"s{number:03d}", "png": encoded("PNG"), "cls": label.encode()})
    return folder


def opened(root: Path, tmp_path: Path, tasks: list[str] | None = None, **options: object) -> EvalData:
    config = EvalSet(data=str(root), tasks=tasks or ["zero_shot"], **options)
    return open_eval_set("mine", config, tmp_path / "cache", IndexStore.create(tmp_path / "cache"))


def named(data: EvalData, split: str = "test") -> dict[str, str]:
    """Class name by picture, as the figures take them."""
    samples = getattr(data, split)
    return {samples.key(row): data.class_names[label] for row, label in enumerate(samples.labels)}


def refused(root: Path, tmp_path: Path, *words: str, **options: object) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(root, tmp_path, **options)
    message = str(caught.value)
    assert message.startswith("eval.sets.mine: ") and message.isprintable() and len(message) < 700
    assert all(word in message for word in words), message


def test_numbered_folders_are_lines_of_the_list(tmp_path):
    root = folders(tmp_path / "set" / "test", [str(number) for number in range(12)]).parent
    expected = {f"{number}/0": name for number, name in enumerate(COLOURS)}
    assert opened(root, tmp_path).class_names == [str(number) for number in range(12)]
    given = listing(tmp_path / "names.txt", COLOURS)
    assert named(opened(root, tmp_path, class_names=str(given))) == expected
    listing(root / "classnames.txt", COLOURS)
    assert named(opened(root, tmp_path)) == expected
    # Leading zeros, and pictures in the order of the labels.
    for number in range(12):
        (root / "test" / str(number)).rename(root / "test" / f"{number:03d}")
    assert list(named(opened(root, tmp_path)).items()) == [(f"{n:03d}/0", name) for n, name in enumerate(COLOURS)]


def test_folders_named_by_the_list_are_its_lines_in_its_order(tmp_path):
    names = ["sea green", "amber", "café", "brick_red"]
    root = folders(tmp_path / "set", ["amber", "brick_red", "cafe\u0301", "sea_green"])
    listing(root / "classnames.txt", names)
    found = named(opened(root, tmp_path))
    assert found == {"sea_green/0": "sea green", "amber/0": "amber", "cafe\u0301/0": "café", "brick_red/0": "brick_red"}
    assert opened(root, tmp_path).class_names == names


def test_word_net_ids_belong_to_the_list_of_imagenet_alone(tmp_path):
    from timm.data import ImageNetInfo

    ids = list(ImageNetInfo("imagenet-1k").label_names())
    root = folders(tmp_path / "set" / "val", ids).parent
    data = opened(root, tmp_path, class_names="imagenet")
    assert named(data)["n01443537/0"] == "goldfish" and data.test.labels == tuple(range(1000))
    listing(tmp_path / "names.txt", [f"class {number}" for number in range(1000)])
    refused(root, tmp_path, "n01440764 belongs to no line of", class_names=str(tmp_path / "names.txt"))
    (root / "val" / "n01443537").rename(root / "val" / "n99999999")
    refused(root, tmp_path, "belongs to no line of the list 'imagenet'", class_names="imagenet")


@pytest.mark.parametrize(
    ("names", "lines", "words"),
    [
        (["1", "2", "3"], COLOURS[:3], ["/3 is beyond", "classnames.txt, which has 3 names", "count from 1"]),
        (["0", "1", "7"], COLOURS[:3], ["/7 is beyond", "0 to 2"]),
        (["0", "1", "2"], COLOURS[:4], ["4 class names for 3 class folders", "line 4 ('cyan') has no folder"]),
        (["0", "2"], COLOURS[:3], ["line 2 ('green') has no folder", "'1'"]),
        (["red", "green"], COLOURS[:3], ["line 3 ('blue') has no folder"]),
        (["red", "green", "teal"], COLOURS[:3], ["/teal belongs to no line of", "classnames.txt"]),
        (["0", "1", "extra"], COLOURS[:3], ["/extra belongs to no line"]),
        (["-1", "0", "1"], COLOURS[:3], ["/-1 belongs to no line"]),
        (["0", "1", "01"], COLOURS[:2], ["'01' and '1'", "line 2 ('green')"]),
        (["a_b", "a b"], ["a b", "c"], ["'a b' and 'a_b'", "line 1"]),
        (["0", "1"], ["1", "0"], ["may be", "line 1 ('1') by its number", "line 2 ('0') by its name"]),
        (["0", "1", "2"], ["red", "", "blue"], ["classnames.txt line 2 is blank"]),
        (["0", "1", "2"], ["red", "blue", "red"], ["classnames.txt line 3 repeats 'red' of line 1"]),
    ],
)
def test_what_does_not_fit_the_list_is_refused(names, lines, words, tmp_path):
    root = folders(tmp_path / "set", names)
    listing(root / "classnames.txt", lines)
    refused(root, tmp_path, *words)


def test_numbers_that_are_names_too_are_no_doubt_where_both_agree(tmp_path):
    root = folders(tmp_path / "digits", ["0", "1", "2"])
    listing(root / "classnames.txt", ["0", "1", "2"])
    assert named(opened(root, tmp_path)) == {"0/0": "0", "1/0": "1", "2/0": "2"}
    # Beyond the lines they can only be names.
    root = folders(tmp_path / "years", ["2011", "2010"])
    listing(root / "classnames.txt", ["2011", "2010"])
    assert named(opened(root, tmp_path)) == {"2011/0": "2011", "2010/0": "2010"}


def test_a_list_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffred\r\nsea\u2028green \r\nblue\x85\r\n\r\n".encode())
    assert read_lines(path) == ["red", "sea\u2028green", "blue"]
    path.write_text("\nred\n")
    with pytest.raises(ConfigError, match=r"names.txt line 1 is blank"):
        read_class_names(str(path), None)
    own = listing(tmp_path / "classnames.txt", COLOURS)
    listing(path, ["name", *COLOURS])
    with pytest.raises(ConfigError, match=r"names.txt has 13 names, the set's own .*classnames.txt has 12"):
        read_class_names(str(path), own)
    # ImageNet's own list names two pairs of classes alike.
    imagenet = read_class_names("imagenet", None).names
    assert read_class_names(str(listing(path, imagenet)), None).names == imagenet


@pytest.mark.parametrize("name", ["val", "validation", "valid", "Val", "testing"])
def test_another_name_serves_as_the_test_split(name, tmp_path):
    root = folders(tmp_path / "set" / name, ["0", "1", "10", "2"], pictures=2).parent
    folders(root / "train", ["0", "1", "10", "2"], pictures=3)
    (root / "meta").mkdir()
    data = opened(root, tmp_path)
    assert data.test.root == root / name and data.train is None
    assert data.class_names == ["0", "1", "2", "10"] and data.test.num_samples == 8
    assert opened(root, tmp_path, PROBE).train.num_samples == 12
    # Where there is a test split it counts, unless it is one of pictures without classes.
    folders(root / "test", ["0", "1", "10", "2"])
    assert opened(root, tmp_path).test.root == root / "test"


def test_pictures_without_classes_are_no_split(tmp_path):
    root = folders(tmp_path / "set" / "val", ["cat", "dog"]).parent
    folders(root, ["test"])
    assert opened(root, tmp_path).test.root == root / "val"


def test_a_class_may_be_called_train(tmp_path):
    root = folders(tmp_path / "set", ["bus", "train"])
    assert opened(root, tmp_path).class_names == ["bus", "train"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train/a", "train/b"], ["'train' and no test or val folder"]),
        (["train", "val"], ["'train' and no test or val folder with classes"]),
        (["train"], ["'train' and no test"]),
        (["cat", "dog", "test"], ["'test' and no test or val folder with classes"]),
        (["a/train/x", "a/test/x", "b/train/x"], ["/a holds the splits test, train"]),
        (["val/images"], ["one class folder only ('images')"]),
        (["test/a b", "test/a_b"], ["'a b' and 'a_b'", "same class name 'a b'"]),
    ],
)
def test_splits_are_never_taken_for_classes(names, words, tmp_path):
    refused(folders(tmp_path / "set", names), tmp_path, *words)


def test_an_empty_split_is_not_passed_over(tmp_path):
    root = folders(tmp_path / "set" / "val", ["cat", "dog"]).parent
    (root / "test").mkdir()
    refused(root, tmp_path, "test holds neither class folders nor shards")


def test_a_class_missing_from_one_split_shifts_no_other(tmp_path):
    root = folders(tmp_path / "set" / "train", COLOURS[:4]).parent
    folders(root / "test", ["blue", "cyan", "red"])
    for tasks in (["zero_shot"], PROBE):
        data = opened(root, tmp_path, tasks)
        assert data.class_names == sorted(COLOURS[:4])
        assert named(data) == {"blue/0": "blue", "cyan/0": "cyan", "red/0": "red"}
    assert named(data, "train")["green/0"] == "green"
    # A probe cannot know what it was not trained on.
    (root / "train" / "blue").rename(root / "train" / "Blue")
    refused(root, tmp_path, "test/blue has no counterpart in", "train", tasks=PROBE)
    assert opened(root, tmp_path).class_names == ["blue", "cyan", "red"]
    listing(root / "classnames.txt", ["red", "green", "cyan", "blue"])
    refused(root, tmp_path, "train/Blue belongs to no line of", tasks=PROBE)
    (root / "train" / "Blue").rename(root / "train" / "blue")
    data = opened(root, tmp_path, PROBE)
    assert data.train.labels == (0, 1, 2, 3) and data.test.labels == (0, 2, 3)
    (root / "train" / "cyan" / "0.png").unlink()
    refused(root, tmp_path, "train holds no picture of class 'cyan'", tasks=PROBE)


def test_shards_beside_folders_need_a_list(tmp_path):
    root = folders(tmp_path / "set" / "test", ["green", "red"]).parent
    shards(root / "train", ["0", "1"])
    refused(root, tmp_path, "holds class folders and", "classnames.txt", tasks=PROBE)
    listing(root / "classnames.txt", ["red", "green"])
    assert opened(root, tmp_path, PROBE).test.labels == (0, 1)
    (root / "test" / "0.tar").touch()
    refused(root, tmp_path, "holds shards (0.tar) and a folder of pictures ('green')")


def test_an_empty_class_folder_keeps_its_number_or_is_refused(tmp_path):
    root = folders(tmp_path / "set", ["0", "1", "2"])
    (root / "1" / "0.png").rename(root / "1" / "0.bmp")
    refused(root, tmp_path, "/1 holds no pictures")
    listing(root / "classnames.txt", COLOURS[:3])
    assert opened(root, tmp_path).test.labels == (0, 2)


def test_hidden_names_and_litter_are_skipped(tmp_path):
    root = folders(tmp_path / "set", ["red", "blue", ".ipynb_checkpoints", "red/.cache", "__MACOSX"])
    (root / "red" / "._0.png").touch()
    (root / "red" / "PHOTO.JPG").touch()
    (root / "red" / "deeper").mkdir()
    (root / "red" / "deeper" / "x.JpEg").touch()
    (root / "._0.tar").touch()
    data = opened(root, tmp_path)
    assert data.class_names == ["blue", "red"]
    assert list(named(data)) == ["blue/0", "red/0", "red/PHOTO", "red/deeper/x"]


def test_hidden_shards_are_skipped(tmp_path):
    root = shards(tmp_path / "set" / "test", ["0", "1"]).parent
    (root / "test" / "._0.tar").write_bytes(b"resource fork")
    listing(root / "classnames.txt", ["red", "blue"])
    assert [Path(shard).name for shard in opened(root, tmp_path).test[0].shards] == ["0.tar"]


def test_links_are_followed_once(tmp_path):
    root = folders(tmp_path / "set", ["red", "blue"], pictures=2)
    elsewhere = folders(tmp_path / "elsewhere", ["green", "more"], pictures=2)
    (root / "green").symlink_to(elsewhere / "green")
    (root / "red" / "again").symlink_to(".")
    (root / "red" / "copy.png").symlink_to("0.png")
    (root / "red" / "a").symlink_to(elsewhere / "more")
    (root / "red" / "b").symlink_to(elsewhere / "more")
    (root / "blue" / "one.png").symlink_to(elsewhere / "single.png")
    (root / "blue" / "two.png").symlink_to(elsewhere / "single.png")
    (elsewhere / "single.png").touch()
    (elsewhere / "more" / "back").symlink_to(root / "red")
    found = open_image_folder(root)
    assert [found.key(row) for row in range(found.num_samples)] == [
        "blue/0", "blue/1", "blue/one", "green/0", "green/1", "red/0", "red/1", "red/a/0", "red/a/1",
    ]  # fmt: skip
    assert found.labels == (0, 0, 0, 1, 1, 2, 2, 2, 2)


@pytest.mark.parametrize(
    ("link", "target", "words"),
    [
        ("crimson", "red", "leads to what class 'red' already has"),
        ("blue/x", "../red", "leads to what class 'red' already has"),
        ("blue/x.png", "../red/0.png", "leads to what class 'red' already has"),
        ("blue/up", "..", "which holds the set itself"),
        ("blue/all", "/", "which holds the set itself"),
        ("green", "../nowhere", "green is a link to nothing"),
        ("blue/more", "../nowhere", "more is a link to nothing"),
    ],
)
def test_links_that_would_shift_labels_are_refused(link, target, words, tmp_path):
    root = folders(tmp_path / "set", ["red", "blue"])
    (root / link).symlink_to(target)
    refused(root, tmp_path, words)


@pytest.mark.parametrize("label", ["12", "-1", "1.0", "1_0", "\u0661", "red", "", "999999999999999999999"])
def test_labels_that_number_no_class_are_refused_with_their_place(label, tmp_path):
    root = shards(tmp_path / "set" / "test", ["3", " 11\n", label or " "]).parent
    listing(root / "classnames.txt", COLOURS)
    data = opened(root, tmp_path)
    from data.loader import build_eval_loader
    from data.sample import EvalTransform

    (batch,) = build_eval_loader(data.test, EvalTransform(16), store=IndexStore.create(tmp_path / "cache"))
    embedded = Embedded(data.test, batch["images"], [0, 1, 2], batch["captions"], batch["metadata"], 0)
    with pytest.raises(ConfigError, match=r"of sample 's002' in .*0\.tar is not in \[0, 12\)"):
        labels_of(embedded, data)
    embedded.metadata[2]["cls"] = 0
    assert labels_of(embedded, data).tolist() == [3, 11, 0]
    embedded.metadata[2]["cls"] = True
    with pytest.raises(ConfigError, match=r"label True of sample"):
        labels_of(embedded, data)


def test_a_list_longer_than_the_set_shows_in_the_summary():
    figures = {"acc1": 0.5, "acc5": 1.0, "mean_per_class_recall": 0.5}
    summary = SetResult("mine", {"zero_shot": figures}, 24, 0, 13, 12).summary()
    assert "(13 classes, samples of only 12, chance 7.69%)" in summary
    assert "(12 classes, chance 8.33%)" in SetResult("mine", {"zero_shot": figures}, 24, 0, 12, 12).summary()


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        ({"crime": ["thief"], "animal": ["dog", "thief"]}, "'thief' of probe.animal is also among probe.crime"),
        ({"crime": []}, "bias needs 'probe'"),
    ],
)
def test_probed_categories_share_no_class(probe, words, tmp_path):
    root = shards(tmp_path / "set" / "test", ["0"]).parent
    listing(root / "classnames.txt", ["red", "blue"])
    refused(root, tmp_path, words, tasks=["bias"], probe=probe)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model,in,v2\nRN50, big,0.5,0.4\n", "line 2 has 4 cells under a header of 3"),
        ("model,in,in\na,0.5,0.4\n", "line 1 names 'in' twice"),
    ],
)
def test_columns_of_baselines_do_not_shift(text, words, tmp_path):
    path = tmp_path / "models.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_baselines(path)
    path.write_text('\ufeffin, v2,model\n0.5,0.4,"RN50, big"\n')
    assert read_baselines(path) == [{"in": 0.5, "v2": 0.4}]
