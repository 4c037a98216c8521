"""Writing a data set: file names, splits, ids, copies and links."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mask_rcnn_plus import UserError
from mask_rcnn_tools.convert.geometry import clip, rectangle
from mask_rcnn_tools.convert.labels import LabelledImage, LabelledObject, Labels
from mask_rcnn_tools.convert.writing import Plan, write_coco

Save = Callable[..., Path]


def make_image(path: Path, name: str = "", label: str = "cat", **fields: Any) -> LabelledImage:
    labelled = LabelledObject(label, [rectangle(2, 3, 12, 8)])
    return LabelledImage(name or path.name, 30, 40, path, objects=[labelled], **fields)


def write(labels: Labels, output: Path, **options: Any) -> dict[str, Any]:
    """The content of each split's json."""
    paths = write_coco(labels, Plan(output, "test", **options))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def file_names(labels: Labels, output: Path, **options: Any) -> dict[str, set[str]]:
    contents = write(labels, output, **options)
    return {s: {image["file_name"] for image in c["images"]} for s, c in contents.items()}


def test_adding_images_does_not_change_the_split_of_others(save: Save, tmp_path: Path) -> None:
    path = save("a.png")
    names = [f"{number}.png" for number in range(60)]
    labels = Labels([make_image(path, name) for name in names])
    few = file_names(Labels([make_image(path, name) for name in names[:30]]), tmp_path / "few")
    many = file_names(labels, tmp_path / "many")
    assert few["val"] <= many["val"] and few["train"] <= many["train"]
    assert 4 <= len(many["val"]) <= 20  # 12 expected
    other = file_names(labels, tmp_path / "other", seed=1)
    assert other["val"] != many["val"]
    assert file_names(labels, tmp_path / "none", val=0.0) == {"train": set(names)}


def test_a_split_of_few_images_has_objects_in_train_and_val(save: Save, tmp_path: Path) -> None:
    path = save("a.png")

    def objects(names: str, labelled: str, seed: int) -> dict[str, set[str]]:
        """The images with objects in each split."""
        labels = Labels([make_image(path, f"{name}.png") for name in names])
        for image in labels.images:
            image.objects = image.objects if image.name[0] in labelled else []
        both = file_names(labels, tmp_path / f"{names}{labelled}{seed}", seed=seed)
        assert set().union(*both.values()) == {f"{name}.png" for name in names}
        return {split: {name[0] for name in files} & set(labelled) for split, files in both.items()}

    for seed in range(12):
        assert objects("a", "a", seed) == {"train": {"a"}}
        assert sorted(map(len, objects("ab", "ab", seed).values())) == [1, 1]
        assert objects("ab", "b", seed) == {"train": {"b"}, "val": set()}
        assert objects("abcdef", "d", seed) == {"train": {"d"}, "val": set()}
        two = objects("abcdef", "be", seed)
        assert sorted(map(len, two.values())) == [1, 1]
        # Objects of a class that is left out do not count.
        labels = Labels([make_image(path, f"{n}.png", "cat" if n == "c" else "dog") for n in "abc"])
        both = write(labels, tmp_path / f"cats{seed}", seed=seed, classes=["cat"])
        assert [image["file_name"] for image in both["train"]["images"]].count("c.png") == 1
        assert len(both["train"]["annotations"]) == 1


def test_a_source_whose_train_split_has_no_objects(save: Save, tmp_path: Path) -> None:
    path = save("a.png")
    labels = Labels([make_image(path, f"{number}.png", split="val") for number in range(3)])
    assert file_names(labels, tmp_path / "own") == {"val": {"0.png", "1.png", "2.png"}}
    ((note, places),) = labels.noted.items()
    assert "--val 0.2" in note and places == ["train"]
    labels = Labels([make_image(path, f"{number}.png", split="val") for number in range(3)])
    assert (
        set(file_names(labels, tmp_path / "new", val=0.2)) == {"train", "val"} and not labels.noted
    )


def test_the_splits_of_the_source_are_the_default(save: Save, tmp_path: Path) -> None:
    path = save("a.png")

    def labels() -> Labels:
        return Labels([make_image(path, f"{s}.png", split=s) for s in ("train", "val", "test")])

    assert file_names(labels(), tmp_path / "own") == {
        s: {f"{s}.png"} for s in ("train", "val", "test")
    }
    assert file_names(labels(), tmp_path / "all", split="day") == {
        "day": {"train.png", "val.png", "test.png"}
    }
    assert set(file_names(labels(), tmp_path / "random", val=0.5)) == {"train", "val"}


def test_category_ids_are_the_same_in_every_split(save: Save, tmp_path: Path) -> None:
    path = save("a.png")
    labels = Labels(
        [
            make_image(path, "a.png", "zebra", split="train"),
            make_image(path, "b.png", "ant", split="val"),
        ]
    )
    both = [{"id": 1, "name": "ant"}, {"id": 2, "name": "zebra"}]
    assert [c["categories"] for c in write(labels, tmp_path / "1").values()] == [both, both]
    given = write(labels, tmp_path / "2", classes=["zebra", "yak"])
    assert given["train"]["categories"] == [{"id": 1, "name": "zebra"}, {"id": 2, "name": "yak"}]
    assert given["train"]["annotations"][0]["category_id"] == 1
    assert given["val"]["annotations"] == []  # the ant is left out, with a note
    ((note, places),) = labels.noted.items()
    assert "'ant'" in note and places == ["b.png"]
    with pytest.raises(UserError, match="'yak' is named twice"):
        write(labels, tmp_path / "3", classes=["yak", "yak"])


def test_two_images_with_the_same_name_are_both_kept(save: Save, tmp_path: Path) -> None:
    first, second = save("x/a.png"), save("yy/A.png")
    labels = Labels([make_image(first), make_image(second)])
    names = file_names(labels, tmp_path / "out", split="all")["all"]
    assert len(names) == 2 and len({name.casefold() for name in names}) == 2
    written = {path.read_bytes() for path in (tmp_path / "out" / "images").iterdir()}
    assert written == {first.read_bytes(), second.read_bytes()}
    assert sum(map(len, labels.noted.values())) == 1


def test_existing_files_are_replaced_only_with_overwrite(save: Save, tmp_path: Path) -> None:
    path, out = save("a.png"), tmp_path / "out"
    write(Labels([make_image(path)]), out, split="train")
    with pytest.raises(UserError, match=r"train\.json' exists; .*--overwrite"):
        write(Labels([make_image(path)]), out, split="train")
    write(Labels([make_image(path)]), out, split="val")  # an equal image may exist
    (out / "images" / "a.png").write_bytes(b"another")
    with pytest.raises(UserError, match=r"images/a\.png'.*--overwrite"):
        write(Labels([make_image(path)]), out, split="test")
    write(Labels([make_image(path)]), out, split="train", overwrite=True)
    assert (out / "images" / "a.png").read_bytes() == path.read_bytes()
    (out / "day").mkdir()  # the images of day.json would be expected in it
    with pytest.raises(UserError, match=r"day'.*day\.json"):
        write(Labels([make_image(path)]), out, split="day")


def test_links_are_hard_links(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save("a.png")
    write(Labels([make_image(path)]), tmp_path / "out", link=True)
    target = tmp_path / "out" / "images" / "a.png"
    # The data check refuses symbolic links that lead out of the folder.
    assert target.samefile(path) and not target.is_symlink()

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(UserError, match=r"Invalid cross-device link.*--copy"):
        write(Labels([make_image(path)]), tmp_path / "other", link=True)


def test_a_source_without_images_or_objects_is_refused(save: Save, tmp_path: Path) -> None:
    labels = Labels()
    labels.skip("images are missing", "a.json")
    with pytest.raises(
        UserError, match=r"no images to convert: images are missing \(1, such as a\.json\)"
    ):
        write(labels, tmp_path / "out")
    with pytest.raises(UserError, match="no objects to convert"):
        write(Labels([LabelledImage("a.png", 30, 40, save("a.png"))]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_clipping() -> None:
    inside = [1.0, 1.0, 5.0, 1.0, 5.0, 4.0]
    assert clip(inside, 10, 10) == inside
    # Only the right half of the lower half of a diamond is inside; the tips are cut off.
    assert clip([0, -5, 5, 0, 0, 5, -5, 0], 10, 10) in (
        [5, 0, 0, 5, 0, 0],
        [0, 0, 5, 0, 0, 5],
        [0, 5, 0, 0, 5, 0],
    )
    assert clip([-5, -5, -1, -5, -1, -1], 10, 10) == []
