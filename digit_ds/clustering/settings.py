"""Settings of K-Means."""

from typing import Annotated, Literal

from pydantic import Field

from digit_ds.settings import Option, PathText, Section

Backend = Literal["auto", "faiss", "torch", "triton"]


class KMeansSettings(Section):
    """Cluster features into a codebook, over all points and all processes."""

    NOT_RECORDED = frozenset({"features", "out", "backend"})
    FIRST_RECORDED = frozenset({"clusters", "iterations", "seed", "init"})

    features: Annotated[PathText, Option(metavar="FEATURES")]
    """Folder that digit-ds features wrote, or an array .npy [points, width]."""
    clusters: int = Field(ge=1)
    """Number of codes K."""
    out: Annotated[PathText, Option(metavar="NPY")]
    """Codebook to write, .npy [K, width]; its provenance is written beside it, metrics and state to folder OUT.run."""
    iterations: int = Field(20, ge=1)
    """Number of Lloyd iterations."""
    seed: int = 0
    """Seed of the initial centroids."""
    backend: Backend = "auto"
    """Implementation of the nearest-centroid search; auto: the fastest exact one on this machine."""
    init: PathText = "random"
    """Initial centroids: ``random`` (points), ``k-means++`` (its parallel form k-means||) or a .npy file [K, width]."""
