"""Small real data as tasks of VTAB's kind: a folder of pictures with ``labels.csv`` (file, label, split) for each.

    python -m tests.domains.vision.real FOLDER      # from $SCION_DATA, for `lightning run domains/vision/folder.yaml`

Natural: CIFAR-10. Specialized: kinds of blood cells (BCCD, boxes cut out), numbers of nuclei (DSB 2018). Structured:
number of objects in a box of NLVR, and place of its only yellow one. These are none of VTAB's own tasks.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from core.random_state import seed_of

DATA = Path(os.environ.get("SCION_DATA", "../shared/data"))
"""Where the archives lie."""
SETS = {"train": 1000, "test": 600}
"""Most pictures of each set."""
Picture = tuple[str, Image.Image, str, str]
"""name, picture, label, split"""


def cifar() -> Iterator[Picture]:
    with zipfile.ZipFile(DATA / "cifar10_images/cifar10_images.zip") as archive:
        for name in sorted(archive.namelist()):
            split, label, file = name.split("/")
            with archive.open(name) as stream:
                yield f"{split}-{label}-{file}", Image.open(stream).convert("RGB"), label, split


def cells() -> Iterator[Picture]:
    """Boxes around cells, a tenth wider on each side; those that leave the picture are clipped, slivers left out."""
    home = DATA / "bccd/BCCD"
    for split, name in (("train", "train"), ("test", "val")):
        for stem in (home / f"ImageSets/Main/{name}.txt").read_text().split():
            picture = Image.open(home / f"JPEGImages/{stem}.jpg").convert("RGB")
            for number, found in enumerate(ET.parse(home / f"Annotations/{stem}.xml").iter("object")):
                box = [int(found.findtext(f"bndbox/{edge}", "0")) for edge in ("xmin", "ymin", "xmax", "ymax")]
                wide, high = box[2] - box[0], box[3] - box[1]
                if min(wide, high) < 8:
                    continue
                edges = (max(0, box[0] - wide // 10), max(0, box[1] - high // 10),
                         min(picture.width, box[2] + wide // 10), min(picture.height, box[3] + high // 10))
                yield f"{stem}-{number}.png", picture.crop(edges), found.findtext("name", ""), split


def nuclei() -> Iterator[Picture]:
    """Quarters of the training pictures as they come; the label is a class of their number of nuclei's centres."""
    import numpy as np

    with zipfile.ZipFile(DATA / "dsb2018_nuclei/dsb2018_nuclei.zip") as archive:
        for name in sorted(name for name in archive.namelist() if "/images/" in name):
            with archive.open(name) as stream:
                picture = Image.open(stream).convert("RGB")
            with archive.open(name.replace("/images/", "/labels/")) as stream:
                labels = np.asarray(Image.open(stream)).astype(int)
            numbers = np.unique(labels[labels > 0])
            centres = [np.argwhere(labels == number).mean(0) for number in numbers]
            half = picture.height // 2, picture.width // 2
            for quarter in range(4):
                top, left = (quarter // 2) * half[0], (quarter % 2) * half[1]
                inside = sum(top <= y < top + half[0] and left <= x < left + half[1] for y, x in centres)
                label = next(text for most, text in ((3, "0-3"), (8, "4-8"), (16, "9-16"), (10**6, "17+"))
                             if inside <= most)
                yield (f"{Path(name).stem}-{quarter}.png", picture.crop((left, top, left + half[1], top + half[0])),
                       label, "train" if name.startswith("train") else "test")


def boxes() -> Iterator[tuple[str, Image.Image, list[dict], str]]:
    """The three boxes of each scene of NLVR, [100 x 100], with their objects; permutation 0, whose order is known."""
    for split, part in (("train", "dev"), ("test", "test")):
        with zipfile.ZipFile(DATA / f"nlvr/nlvr_{part}_images.zip") as archive:
            for line in (DATA / f"nlvr/{part}.json").read_text().splitlines():
                scene = json.loads(line)
                name = f"{part}/images/{scene['directory']}/{part}-{scene['identifier']}-0.png"
                with archive.open(name) as stream:
                    picture = Image.open(stream).convert("RGB")
                for number, objects in enumerate(scene["structured_rep"]):
                    crop = picture.crop((150 * number, 0, 150 * number + 100, 100))
                    yield f"{part}-{scene['identifier']}-{number}.png", crop, objects, split


def count() -> Iterator[Picture]:
    for name, picture, objects, split in boxes():
        yield name, picture, str(min(len(objects), 7)), split


def position() -> Iterator[Picture]:
    """Where, of six equal parts from left to right, the middle of the only yellow object lies."""
    for name, picture, objects, split in boxes():
        yellow = [one for one in objects if one["color"] == "Yellow"]
        if len(yellow) == 1:
            middle = yellow[0]["x_loc"] + yellow[0]["size"] / 2
            yield name, picture, str(min(int(middle * 6 / 100), 5)), split


TASKS = {"cifar": cifar, "cells": cells, "nuclei": nuclei, "count": count, "position": position}


def prepare(task: str, folder: Path, most: dict[str, int] | None = None) -> Path:
    """Write ``folder / task`` and return it: at most so many pictures a set, classes as equal as they can be, always
    the same."""
    home = folder / task
    home.mkdir(parents=True, exist_ok=True)
    wanted, kept = most or SETS, Counter[tuple[str, str]]()
    pictures = sorted(TASKS[task](), key=lambda one: seed_of("real", task, one[0]))
    labels = {label for _, _, label, _ in pictures}
    rows = []
    for name, picture, label, split in pictures:
        if kept[split, label] < wanted[split] // len(labels):
            kept[split, label] += 1
            picture.save(home / name)
            rows.append((name, label, split))
    with (home / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("file", "label", "split"), *sorted(rows)])
    return home


if __name__ == "__main__":
    for task in TASKS:
        home = prepare(task, Path(sys.argv[1]))
        with (home / "labels.csv").open() as stream:
            rows = Counter((row["split"], row["label"]) for row in csv.DictReader(stream))
        print(task, dict(sorted(rows.items())))
