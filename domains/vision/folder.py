r"""Anybody's pictures: a folder with a subfolder for each class, or a table of files and labels.

    >>> data = ImageFolder(root="my_pictures")                                      # my_pictures/<class>/*.jpg
    >>> data = ImageFolder(root="my_pictures", table="labels.csv", separator="|")   # several labels a picture
    >>> data = ImageFolder(root="scans", label_pattern=r"^(\w+)_\d+")               # labels in the files' names

Pictures may have any size, proportion and colours. What cannot be read is left out and named.
"""

from __future__ import annotations

from torch import Tensor

from core.data.own_files import FolderData
from domains.vision.images import ImageData


class ImageFolder(FolderData, ImageData):
    """Pictures in a folder, labelled by their subfolders, by a table, or by their names.

    Without a folder the mini of eight rendered textures takes its place.

    Args:
        root, table, file_column and all others: see ``FolderData`` and ``ImageData``.
    """

    title = "ImageFolder"
    obtain = "give the folder of your pictures as data.root"
    mini_name = "mini textures (8 rendered surfaces) in the place of a folder"
    benchmarks = {
        "images.txt": "domains/vision/metric.yaml --data.dataset cub",
        "cars_annos.mat": "domains/vision/metric.yaml --data.dataset cars",
        "Ebay_train.txt": "domains/vision/metric.yaml --data.dataset sop",
        "list_eval_partition.txt": "domains/vision/metric.yaml --data.dataset inshop",
        "train.json": "domains/vision/fgvc.yaml", "train800val200.txt": "domains/vision/vtab1k.yaml"}
    mini_is = "eight rendered surfaces"

    def mini_classes(self) -> list[str]:
        from domains.vision import mini

        return list(mini.TASKS["textures"].classes)

    def mini_parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        from domains.vision import mini

        return {which: mini.split("textures", which) for which in mini.SIZES}
