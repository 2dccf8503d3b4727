"""Times the network of the PyPI package voxelmorph (torch) on a random 128^3 pair; imports nothing of this project.

PEER_PYTHON Training/evaluation/voxelmorph_timing.py --threads N --repeats R

Prints one JSON object: seconds (list, warm), parameters, version. Layout: its `VxmPairwise` with default features,
without integration and without warping, so that it is what the other networks are timed for: images to displacement.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time


def main() -> int:
    """Time the network; return 3 if a package is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=128)
    a = parser.parse_args()
    try:
        import torch
        import voxelmorph
    except ImportError as error:
        print(f"package voxelmorph is missing or cannot be used ({error})", file=sys.stderr)
        return 3
    torch.set_num_threads(a.threads)
    network = voxelmorph.nn.models.VxmPairwise(ndim=3, source_channels=1, target_channels=1, integration_steps=0).eval()
    pair = torch.rand(2, 1, 1, a.size, a.size, a.size)
    seconds = []
    with torch.no_grad():
        for _ in range(a.repeats + 1):
            began = time.perf_counter()
            network(*pair)
            seconds.append(time.perf_counter() - began)
    parameters = sum(p.numel() for p in network.parameters())
    version = importlib.metadata.version("voxelmorph")
    print(json.dumps({"seconds": seconds[1:], "parameters": parameters, "version": version}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
