"""Which folder of a data set holds its images, judged by the folders next to it, such as those of masks; how masks are named."""

import os
from collections.abc import Collection, Sequence

# Folders of images and of what belongs to them, as in detection and segmentation data; they are no classes.
IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages", "jpegs", "photos", "pictures", "rgb"})
SIDE_FOLDERS = frozenset(
    ("labels", "label", "annotations", "annotation", "masks", "mask", "groundtruth", "ground_truth", "gt", "segmentation",
     "segmentationclass", "segmentationobject", "trimaps", "bbox", "boxes", "imagesets")
)  # fmt: skip
MASK_END = ".seg.png"  # of the mask beside an image: read by the dense probe, and no image itself


def are_no_classes(folders: Collection[str]) -> bool:
    return {name.lower() for name in folders} <= IMAGE_FOLDERS | SIDE_FOLDERS


def main_folder(folders: Collection[str]) -> str:
    """Return the folder of the images among those of masks and the like, "" where the folders are something else."""
    images = [name for name in folders if name.lower() in IMAGE_FOLDERS]
    return images[0] if len(images) == 1 and are_no_classes(folders) else ""


def folder_of_images(names: Sequence[str]) -> str:
    """Return `a/images/` where that lies among masks and the like in the deepest folder that holds all of `names`, else ""."""
    below = ""
    while True:
        common = common_folder(names)
        if not (inner := main_folder({first_folder(name[common:]) for name in names})):
            return below
        below = f"{names[0][:common]}{inner}/"
        names = [name for name in names if name.startswith(below)]


def common_folder(names: Sequence[str]) -> int:
    """Return the length of the deepest folder that holds all images, with its slash; 0 where there is none."""
    common = os.path.commonprefix([min(names, default=""), max(names, default="")])  # noqa: RUF071  (thus of all names)
    return common.rfind("/") + 1


def first_folder(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""
