"""Measure an edited clip against its source, like Edit Check, from the command line.

nox -s measure -- source.mp4 edited.mp4 [--plot plot.png]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="nox -s measure --", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="source video; as many frames are read as the edited clip has")
    parser.add_argument("edited", type=Path, help="edited clip; the source is resized to it")
    parser.add_argument("--start", type=int, default=0, help="first frame of the source that was edited")
    parser.add_argument(
        "--stride", type=int, default=1, help="the stride of Load Frames: every n-th frame of the source was edited"
    )
    parser.add_argument("--plot", type=Path, help="file for the plot")
    parser.add_argument("--check-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for path in (arguments.source, arguments.edited):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    if arguments.check_only:
        return

    from cove.draw import plot_edit
    from cove.frames import read_frames
    from cove.metrics import check_libraries, format_table, measure_edit, summarize_edit

    check_libraries()
    edited = read_frames(arguments.edited).images
    height, width = edited.shape[1:3]
    taken = {"start": arguments.start, "stride": arguments.stride, "count": len(edited)}
    source = read_frames(arguments.source, **taken, width=width, height=height).images
    columns = measure_edit(source, edited)
    print(f"{len(edited)} frames of {width}x{height}. {summarize_edit(columns)}\n\n{format_table(columns)}")
    if arguments.plot:
        from PIL import Image

        (picture,) = plot_edit(columns)
        Image.fromarray((picture * 255).round().byte().numpy()).save(arguments.plot)
        print(f"\nthe plot: {arguments.plot}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as failure:
        sys.exit(f"{failure}")
