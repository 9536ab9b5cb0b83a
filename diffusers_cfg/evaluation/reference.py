"""Read reference statistics, with which published figures were measured, and compare samples with them."""

import logging
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation.features import INCEPTION, Inception, pretrained_extractor
from diffusers_cfg.evaluation.statistics import (
    BATCH_SIZE,
    MAX_NEIGHBOURS,
    Gaussian,
    Reference,
    Summarizer,
    Summary,
    read_summaries,
    warn_if_rank_deficient,
    write_summaries,
)
from diffusers_cfg.files import checksum
from diffusers_cfg.randomness import seed_of
from diffusers_cfg.run_settings import MIN_SAMPLES

logger = logging.getLogger(__name__)

MEAN, COVARIANCE, SPATIAL_MEAN, SPATIAL_COVARIANCE, IMAGES = "mu", "sigma", "mu_s", "sigma_s", "arr_0"
# How far a covariance may be from symmetric and positive semi-definite, relative to its largest value and eigenvalue:
# the rounding of float32, in which statistics may be stored, 6e-8 for each value and √2048 times that for eigenvalues.
TOLERANCE = 1e-5
# The largest squared distance of the mean of the images' features from the mean in the file, in total variances. Of n
# images at random it is 1/n on average, at most 0.05. The means of different networks differ by as much as their
# features vary.
MAX_MEAN_DISTANCE = 0.25

Moments = tuple[torch.Tensor, torch.Tensor]  # mean (features,) and covariance (features, features), in float64


class ReferenceFile(NamedTuple):
    """The contents of a file of reference statistics."""

    path: Path
    sha256: str
    moments: Moments
    spatial_moments: Moments | None
    num_images: int  # 0 if it has no images


def read_reference(path: Path, resolution: int) -> ReferenceFile:
    """
    Read statistics of Inception's features from an npz file: a reference batch of ADM's evaluator
    (`VIRTUAL_imagenet64_labeled.npz`), with `mu`, `sigma`, `mu_s`, `sigma_s` and images in `arr_0`, or those of EDM,
    with `mu` and `sigma`.

    Args:
        path (`Path`): the file. It is never unpickled.
        resolution (`int`): the height and width of the samples.

    Raises:
        UserError: if the file cannot be read, or if its contents are not statistics of these features or have images
            of another size.
    """
    if not path.is_file():
        raise UserError(f"--reference {path} is not a file. Download the reference statistics first.")
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start[:1] == b"\x80" or path.suffix in (".pkl", ".pickle"):
            raise UserError(
                f"--reference {path} is a pickle, which can run code when it is read. If you trust it, convert it once "
                "in Python. For EDM2: import pickle, numpy; numpy.savez('reference.npz', "
                "**pickle.load(open('FILE.pkl', 'rb'))['fid'])"
            )
        if start != b"PK":
            raise UserError(f"--reference {path} is not an npz file. Pass an npz file with {MEAN} and {COVARIANCE}.")
        with zipfile.ZipFile(path) as archive:
            headers = {name: read_header(archive, name) for name in array_names(archive)}
        check_headers(path, headers, resolution)
        # Only the arrays that were checked are read.
        with np.load(path, allow_pickle=False) as arrays:
            moments, spatial = read_moments(path, arrays, MEAN, COVARIANCE), None
            if SPATIAL_MEAN in headers:
                spatial = read_moments(path, arrays, SPATIAL_MEAN, SPATIAL_COVARIANCE)
        sha256 = checksum(path)
    except UserError:  # a ValueError itself
        raise
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise damaged(path, error) from error
    num_images = headers[IMAGES].shape[0] if IMAGES in headers else 0
    return ReferenceFile(path, sha256, moments, spatial, num_images)


def damaged(path: Path, error: Exception) -> UserError:
    """Return the error for a file that cannot be read to its end."""
    return UserError(f"--reference {path} cannot be read ({error}). Download it again.")


class Header(NamedTuple):
    """The header of an array in an npz file."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """Return the names of the arrays of an npz file that reference statistics consist of."""
    known = (MEAN, COVARIANCE, SPATIAL_MEAN, SPATIAL_COVARIANCE, IMAGES)
    return [name for name in known if f"{name}.npy" in archive.namelist()]


@contextmanager
def open_array(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[Header, IO[bytes]]]:
    """Open an array of an npz file. Yield its header, and the file at the first byte of its data."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{name} has the unknown format {version}")
        shape, fortran_order, dtype = readers[version](file)
        yield Header(shape, fortran_order, dtype), file


def read_header(archive: zipfile.ZipFile, name: str) -> Header:
    """Return the header of an array of an npz file."""
    with open_array(archive, name) as (header, _):
        return header


def check_headers(path: Path, headers: dict[str, Header], resolution: int) -> None:
    """Raise UserError for missing arrays, and for arrays whose shape or type is not that of reference statistics."""
    if missing := [name for name in (MEAN, COVARIANCE) if name not in headers]:
        hint = " It has images only, like a set of samples." if list(headers) == [IMAGES] else ""
        raise UserError(
            f"--reference {path} has no {' and '.join(missing)}.{hint} Reference statistics have the mean {MEAN} and "
            f"the covariance {COVARIANCE} of Inception's features."
        )
    if (SPATIAL_MEAN in headers) != (SPATIAL_COVARIANCE in headers):
        raise UserError(f"--reference {path} has one of {SPATIAL_MEAN} and {SPATIAL_COVARIANCE} without the other.")
    if objects := [name for name, header in headers.items() if header.dtype.hasobject]:
        raise UserError(
            f"--reference {path} has Python objects in {', '.join(objects)}, which can run code when they are read. "
            "Pass a file with arrays of numbers."
        )
    sizes = {MEAN: Inception.num_features, SPATIAL_MEAN: Inception.num_spatial_features}
    shapes = {name: (size,) for name, size in sizes.items()}
    shapes |= {COVARIANCE: 2 * shapes[MEAN], SPATIAL_COVARIANCE: 2 * shapes[SPATIAL_MEAN]}
    for name in (name for name in shapes if name in headers):
        shape, _, dtype = headers[name]
        if shape != shapes[name]:
            raise UserError(
                f"--reference {path} has {name} of shape {shape}, but that of Inception's features is {shapes[name]}: "
                "they are statistics of another network. Pass those of the FID's Inception network."
            )
        if not np.issubdtype(dtype, np.floating):
            raise UserError(f"--reference {path} has {name} of type {dtype} instead of floating-point numbers.")
    if IMAGES in headers:
        (shape, fortran_order, dtype), expected = headers[IMAGES], (resolution, resolution, 3)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order:
            raise UserError(
                f"--reference {path} has {IMAGES} of type {dtype} and shape {shape} instead of uint8 images of shape "
                "(images, height, width, 3) in C order."
            )
        if shape[1:] != expected:
            raise UserError(
                f"--reference {path} has images of {shape[1]}×{shape[2]}, but the model generates "
                f"{resolution}×{resolution}. Pass the statistics of images of that size."
            )
        if shape[0] < MIN_SAMPLES:
            raise UserError(f"--reference {path} has {shape[0]} images in {IMAGES}. At least {MIN_SAMPLES} are needed.")


def read_moments(path: Path, arrays: Mapping[str, np.ndarray], mean_name: str, covariance_name: str) -> Moments:
    """Return a mean and a covariance in float64. Raise UserError if they cannot be those of real numbers."""
    mean, matrix = (torch.from_numpy(arrays[name].astype(np.float64)) for name in (mean_name, covariance_name))
    for name, values in ((mean_name, mean), (covariance_name, matrix)):
        if not torch.isfinite(values).all():
            raise UserError(f"--reference {path} has values in {name} that are not finite. Download it again.")
    if (matrix - matrix.T).abs().max() > TOLERANCE * matrix.abs().max():
        raise UserError(f"--reference {path} has a {covariance_name} that is not symmetric: it is no covariance.")
    eigenvalues = torch.linalg.eigvalsh(matrix)
    if not eigenvalues[-1] > 0 or eigenvalues[0] < -TOLERANCE * eigenvalues[-1]:
        raise UserError(
            f"--reference {path} has a {covariance_name} with eigenvalues from {eigenvalues[0]:.3g} to "
            f"{eigenvalues[-1]:.3g}, but those of a covariance are positive."
        )
    return mean, matrix


def read_images(path: Path, rows: torch.Tensor) -> torch.Tensor:
    """Return images of a file of reference statistics by ascending index, uint8 `(rows, 3, height, width)`."""
    with zipfile.ZipFile(path) as archive, open_array(archive, IMAGES) as (header, file):
        start, shape = file.tell(), header.shape[1:]
        images = np.empty((len(rows), *shape), np.uint8)
        for image, row in zip(images, rows.tolist(), strict=True):
            file.seek(start + row * image.nbytes)
            image[:] = np.frombuffer(file.read(image.nbytes), np.uint8).reshape(shape)
    return torch.from_numpy(images).movedim(-1, 1)


class ReferenceStatistics:
    """
    Reference statistics from a file, in place of `RealStatistics`. If the file has images, they are the neighbours:
    `num_samples` images, at most all and at most 10,000, evenly spaced. Their features are cached. There is no floor,
    because the file has no images that its statistics leave out.

    Args:
        accelerator (`Accelerator`): the processes that share the work.
        file (`ReferenceFile`): the statistics, from `read_reference`.
        id2label (`dict[int, str]`): the names of the model's classes.
        num_samples (`int`): the number of images in a set of samples.
        statistics_dir (`Path`): the folder that caches the features of the images.

    Attributes:
        extractor (`Inception`): the network of the FID.
        summarizer (`Summarizer`): the feature extractor, to add samples to summaries.

    Raises:
        UserError: if the network cannot be loaded, or if the features of the images are not those of the statistics.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        file: ReferenceFile,
        id2label: dict[int, str],
        num_samples: int,
        statistics_dir: Path,
    ) -> None:
        self.accelerator, self.file, self.num_samples = accelerator, file, num_samples
        self.extractor = pretrained_extractor(INCEPTION)
        warn_if_rank_deficient(self.extractor, {"samples": num_samples})
        self.summarizer = Summarizer(self.extractor, id2label, accelerator.device)
        self.images: Summary | None = None
        if file.num_images:
            self.images = self._summarize_images(min(file.num_images, num_samples, MAX_NEIGHBOURS), statistics_dir)
            self._check_images(self.images)

    def _summarize_images(self, number: int, statistics_dir: Path) -> Summary:
        summary = self.summarizer.new_summary(number, moment_blocks=1)
        identity = {"reference": self.file.sha256, "feature_extractor": self.extractor.name, "images": str(number)}
        path = statistics_dir / f"reference-{seed_of(*identity.values()):016x}.safetensors"
        if not read_summaries(path, identity, {"images": summary}):
            rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
            batches = torch.arange(number).split(BATCH_SIZE)[rank::world_size]
            for rows in tqdm(batches, "Reference images", leave=False, disable=None if rank == 0 else True):
                try:
                    images = read_images(self.file.path, rows * self.file.num_images // number)
                except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                    raise damaged(self.file.path, error) from error
                self.summarizer.add(summary, rows, images, torch.full((len(rows),), -1))
            summary.reduce(self.accelerator)
            if self.accelerator.is_main_process:
                write_summaries(path, identity, {"images": summary})
        self.accelerator.wait_for_everyone()
        return summary

    def _check_images(self, images: Summary) -> None:
        """Raise UserError if the mean features of the images are far from those of the statistics."""
        kinds = [(f"{MEAN} and {COVARIANCE}", self.file.moments, False)]
        if self.file.spatial_moments is not None:
            kinds.append((f"{SPATIAL_MEAN} and {SPATIAL_COVARIANCE}", self.file.spatial_moments, True))
        for names, (mean, covariance), spatial in kinds:
            difference = images.moments(spatial=spatial)[0] - mean
            distance = (difference.square().sum() / covariance.trace()).item()
            if distance > MAX_MEAN_DISTANCE:
                raise UserError(
                    f"--reference {self.file.path} has images whose Inception features do not fit {names}: the squared "
                    f"distance of the means is {distance:.2f} of the total variance, and at most {MAX_MEAN_DISTANCE} "
                    "is expected. These are the statistics of other images or of another network."
                )

    @cached_property
    def reference(self) -> Reference:
        """The reference for samples."""
        file = self.file
        spatial = Gaussian.from_moments(file.spatial_moments) if file.spatial_moments else None
        neighbours = None if self.images is None else self.images.features.to(self.accelerator.device)
        return Reference(Gaussian.from_moments(file.moments), spatial, neighbours)

    def record(self) -> dict[str, Any]:
        """Return the settings of the measurement, for JSON. Metrics are comparable if these settings are equal."""
        return {
            "num_samples": self.num_samples,
            "feature_extractor": self.extractor.record(),
            "reference": {
                "name": self.file.path.name,
                "sha256": self.file.sha256,
                "num_images": self.file.num_images,
                "has_spatial_features": self.file.spatial_moments is not None,
            },
            "num_neighbours": 0 if self.images is None else self.images.num_images,
        }
