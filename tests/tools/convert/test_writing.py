"""What becomes of images and objects on disk: names, splits, ids, copies and links."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mask_rcnn_plus import UserError
from mask_rcnn_tools.convert import Found, Picture, Plan, Thing, write_coco
from mask_rcnn_tools.convert.geometry import clip, rectangle

Save = Callable[..., Path]


def picture(path: Path, name: str = "", label: str = "cat", **more: Any) -> Picture:
    thing = Thing(label, [rectangle(2, 3, 12, 8)])
    return Picture(name or path.name, 30, 40, path, things=[thing], **more)


def write(found: Found, output: Path, **options: Any) -> dict[str, Any]:
    """The jsons by split."""
    paths = write_coco(found, Plan(output, "test", progress=False, **options))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def sides(found: Found, output: Path, **options: Any) -> dict[str, set[str]]:
    written = write(found, output, **options)
    return {s: {image["file_name"] for image in c["images"]} for s, c in written.items()}


def test_images_that_are_added_move_none(save: Save, tmp_path: Path) -> None:
    path = save("a.png")
    names = [f"{number}.png" for number in range(60)]
    found = Found([picture(path, name) for name in names])
    few = sides(Found([picture(path, name) for name in names[:30]]), tmp_path / "few")
    many = sides(found, tmp_path / "many")
    assert few["val"] <= many["val"] and few["train"] <= many["train"]
    assert 4 <= len(many["val"]) <= 20  # 12 expected
    other = sides(found, tmp_path / "other", seed=1)
    assert other["val"] != many["val"]
    assert sides(found, tmp_path / "none", val=0.0) == {"train": set(names)}


def test_few_images_leave_no_side_without_objects(save: Save, tmp_path: Path) -> None:
    path = save("a.png")

    def objects(names: str, labelled: str, seed: int) -> dict[str, set[str]]:
        """Which images with objects each side has."""
        found = Found([picture(path, f"{name}.png") for name in names])
        for one in found.pictures:
            one.things = one.things if one.name[0] in labelled else []
        both = sides(found, tmp_path / f"{names}{labelled}{seed}", seed=seed)
        assert set().union(*both.values()) == {f"{name}.png" for name in names}
        return {side: {name[0] for name in files} & set(labelled) for side, files in both.items()}

    for seed in range(12):
        assert objects("a", "a", seed) == {"train": {"a"}}
        assert sorted(map(len, objects("ab", "ab", seed).values())) == [1, 1]
        assert objects("ab", "b", seed) == {"train": {"b"}, "val": set()}
        assert objects("abcdef", "d", seed) == {"train": {"d"}, "val": set()}
        of_two = objects("abcdef", "be", seed)
        assert sorted(map(len, of_two.values())) == [1, 1]
        # Of a class that is left out, or without an area, objects are none.
        found = Found([picture(path, f"{n}.png", "cat" if n == "c" else "dog") for n in "abc"])
        both = write(found, tmp_path / f"cats{seed}", seed=seed, classes=["cat"])
        assert [image["file_name"] for image in both["train"]["images"]].count("c.png") == 1
        assert len(both["train"]["annotations"]) == 1


def test_a_source_whose_own_split_has_nothing_to_train_on(save: Save, tmp_path: Path) -> None:
    path = save("a.png")
    found = Found([picture(path, f"{number}.png", split="val") for number in range(3)])
    assert sides(found, tmp_path / "own") == {"val": {"0.png", "1.png", "2.png"}}
    assert found.noted == {
        "split of the source has no object to train on; --val 0.2 splits anew": ["train"]
    }
    found = Found([picture(path, f"{number}.png", split="val") for number in range(3)])
    assert set(sides(found, tmp_path / "anew", val=0.2)) == {"train", "val"} and not found.noted


def test_the_sources_own_splits_unless_others_are_asked_for(save: Save, tmp_path: Path) -> None:
    path = save("a.png")

    def found() -> Found:
        return Found([picture(path, f"{s}.png", split=s) for s in ("train", "val", "test")])

    assert sides(found(), tmp_path / "own") == {s: {f"{s}.png"} for s in ("train", "val", "test")}
    assert sides(found(), tmp_path / "all", split="day") == {
        "day": {"train.png", "val.png", "test.png"}
    }
    assert set(sides(found(), tmp_path / "drawn", val=0.5)) == {"train", "val"}


def test_category_ids_are_the_same_in_every_split(save: Save, tmp_path: Path) -> None:
    path = save("a.png")
    found = Found(
        [picture(path, "a.png", "zebra", split="train"), picture(path, "b.png", "ant", split="val")]
    )
    both = [{"id": 1, "name": "ant"}, {"id": 2, "name": "zebra"}]
    assert [c["categories"] for c in write(found, tmp_path / "1").values()] == [both, both]
    given = write(found, tmp_path / "2", classes=["zebra", "yak"])
    assert given["train"]["categories"] == [{"id": 1, "name": "zebra"}, {"id": 2, "name": "yak"}]
    assert given["train"]["annotations"][0]["category_id"] == 1
    assert given["val"]["annotations"] == []  # ants are left out, which is told
    assert found.noted == {"objects are of the class 'ant': left out": ["b.png"]}
    with pytest.raises(UserError, match="'yak' is named twice"):
        write(found, tmp_path / "3", classes=["yak", "yak"])


def test_two_images_of_one_name_are_both_kept(save: Save, tmp_path: Path) -> None:
    first, second = save("x/a.png"), save("yy/A.png")
    found = Found([picture(first), picture(second)])
    names = sides(found, tmp_path / "out", split="all")["all"]
    assert len(names) == 2 and len({name.casefold() for name in names}) == 2
    written = {path.read_bytes() for path in (tmp_path / "out" / "images").iterdir()}
    assert written == {first.read_bytes(), second.read_bytes()}
    assert sum(map(len, found.noted.values())) == 1


def test_files_that_are_there_are_not_replaced_unasked(save: Save, tmp_path: Path) -> None:
    path, out = save("a.png"), tmp_path / "out"
    write(Found([picture(path)]), out, split="train")
    with pytest.raises(UserError, match=r"train\.json' exists; .*--overwrite"):
        write(Found([picture(path)]), out, split="train")
    write(Found([picture(path)]), out, split="val")  # the same image is no obstacle
    (out / "images" / "a.png").write_bytes(b"another")
    with pytest.raises(UserError, match="is another image"):
        write(Found([picture(path)]), out, split="test")
    write(Found([picture(path)]), out, split="train", overwrite=True)
    assert (out / "images" / "a.png").read_bytes() == path.read_bytes()
    (out / "day").mkdir()  # whose images a data set by folder would look for in it
    with pytest.raises(UserError, match="would be looked for in it"):
        write(Found([picture(path)]), out, split="day")


def test_links_are_the_same_file(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save("a.png")
    write(Found([picture(path)]), tmp_path / "out", link=True)
    target = tmp_path / "out" / "images" / "a.png"
    # A hard link: the data check refuses those that lead out of the folder.
    assert target.samefile(path) and not target.is_symlink()

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(UserError, match=r"Invalid cross-device link.*--copy"):
        write(Found([picture(path)]), tmp_path / "other", link=True)


def test_nothing_to_convert_is_refused(save: Save, tmp_path: Path) -> None:
    found = Found()
    found.skip("images are not there", "a.json")
    with pytest.raises(
        UserError, match=r"no image to convert: images are not there \(1, as a\.json\)"
    ):
        write(found, tmp_path / "out")
    with pytest.raises(UserError, match="no object to convert"):
        write(Found([Picture("a.png", 30, 40, save("a.png"))]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_clipping_by_hand() -> None:
    inside = [1.0, 1.0, 5.0, 1.0, 5.0, 4.0]
    assert clip(inside, 10, 10) == inside
    # The left half of a diamond is cut off at its tips.
    assert clip([0, -5, 5, 0, 0, 5, -5, 0], 10, 10) in (
        [5, 0, 0, 5, 0, 0],
        [0, 0, 5, 0, 0, 5],
        [0, 5, 0, 0, 5, 0],
    )
    assert clip([-5, -5, -1, -5, -1, -1], 10, 10) == []
