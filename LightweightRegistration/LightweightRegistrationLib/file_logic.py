"""The logic's part that works on files: transforms of other programs, and lists of pairs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import slicer

from . import torch_setup
from .background import Worker
from .batch import BatchJob, Pairs
from .jobs import Job, Settings
from .transform_files import AUTO, LoadTransformJob, SaveTransformJob


class FileLogic:
    """What `LightweightRegistrationLogic` does with files. Methods whose name begins with `start` return a job."""

    worker: Worker
    wait: Callable[..., Any]

    def saveTransform(
        self, transformNode: slicer.vtkMRMLTransformNode, path: str | os.PathLike[str], format: str = AUTO
    ) -> Path:
        """Write a registration transform in the format of another program.

        Args:
            transformNode: the transform of a registration.
            path: of the file; it appears complete or not at all.
            format: a name in `transform_files.FORMATS` ("itk", "ants", "fsl" ...), or "auto": by the file's name.

        Returns:
            The absolute path.

        Raises:
            InputError: the format cannot hold this transform, or the file cannot be written.
        """
        return self.wait(self.startSavingTransform(transformNode, path, format))

    def startSavingTransform(
        self, transformNode: slicer.vtkMRMLTransformNode, path: str | os.PathLike[str], format: str = AUTO
    ) -> Job:
        """Start what `saveTransform` does and return the job to poll."""
        torch_setup.ensure_torch()
        job = SaveTransformJob(self.worker, transformNode, path, format)
        job.start()
        return job

    def loadTransform(
        self,
        path: str | os.PathLike[str],
        fixedNode: slicer.vtkMRMLScalarVolumeNode,
        movingNode: slicer.vtkMRMLScalarVolumeNode,
        format: str = AUTO,
    ) -> slicer.vtkMRMLTransformNode:
        """Read a transform of another program as a new node, for example as an initial transform.

        Args:
            path: of the file.
            fixedNode, movingNode: the volumes between which it maps: many formats count in their voxels.
            format: see `saveTransform`; "auto": by the file's content.

        Raises:
            InputError: the file cannot be read, or its format must be named.
        """
        return self.wait(self.startLoadingTransform(path, fixedNode, movingNode, format))

    def startLoadingTransform(
        self,
        path: str | os.PathLike[str],
        fixedNode: slicer.vtkMRMLScalarVolumeNode,
        movingNode: slicer.vtkMRMLScalarVolumeNode,
        format: str = AUTO,
    ) -> Job:
        """Start what `loadTransform` does and return the job to poll."""
        torch_setup.ensure_torch()
        job = LoadTransformJob(self.worker, path, format)
        job.start(fixedNode, movingNode)
        return job

    def registerMany(
        self,
        pairs: Pairs,
        folder: str | os.PathLike[str],
        *,
        progress: Callable[[float, str], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Register a list of pairs of files into one folder. The same call goes on where an earlier one ended.

        Args:
            pairs, folder: see `batch.BatchJob.start`.
            progress: called with (fraction of the pairs done, what is being done).
            options: see `startBatch`.

        Returns:
            How many are done, reused and failed, the problems, seconds, and the paths of the files and of the page.

        Raises:
            InputError: a list, an option or a folder that cannot be used, or a disk that is full.
        """
        return self.wait(self.startBatch(pairs, folder, **options), progress)

    def startBatch(
        self, pairs: Pairs, folder: str | os.PathLike[str], *, refinementSteps: int = 0, **options: Any
    ) -> Job:
        """Start what `registerMany` does and return the job to poll.

        Options: `kind` to `threads` of `startRegistration`, without masks and initial transform.
        """
        torch_setup.ensure_torch()
        job = BatchJob(self.worker, Settings(refine_steps=refinementSteps, **options))
        job.start(pairs, folder)
        return job
