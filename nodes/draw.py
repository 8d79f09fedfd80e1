"""Show Correspondence: matches or tracks drawn on the frames."""

from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from ..cove import draw
from . import host


class ShowCorrespondence(io.ComfyNode):
    """The picture of COVE (arXiv 2406.08850), appendix "Visualisation of the Correspondence", for any clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveShowCorrespondence",
            display_name="COVE Show Correspondence",
            category="COVE/match",
            description=(
                "Draws points of one frame (red) and their matches in all other frames: best yellow, second green, "
                "others blue. Matches should stay on the same part of the picture; the edit follows them."
            ),
            inputs=[
                io.Image.Input("images", tooltip="The frames of the correspondence. More pixels give a finer drawing."),
                host.wires.Correspondence.Input("correspondence", tooltip="A larger k draws more discs per point."),
                io.String.Input(
                    "points",
                    default="",
                    multiline=True,
                    placeholder="x, y  (one point per line; empty: a grid)",
                    tooltip="One point per line, as x, y in pixels of the frame set below; each has a ring of its own "
                    "colour. Empty = a grid of 3 x 3 points.",
                ),
                io.Int.Input(
                    "frame", default=0, min=0, max=100_000, tooltip="The frame of the points, counted from 0."
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Frames per row of the contact sheet. 0 = about as many as rows.",
                ),
                io.Combo.Input(
                    "style",
                    options=["matches", "tracks"],
                    default="matches",
                    tooltip="matches: all K matches of a point in every frame, as in the paper. tracks: the best match "
                    "only, with a line through the frames before.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The drawn frames."),
                io.Image.Output(display_name="contact sheet", tooltip="All drawn frames in one picture."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    @host.errors.named
    def execute(cls, images, correspondence, points, frame, columns, style) -> io.NodeOutput:
        places = _parse_points(points) or draw.grid_points(*images.shape[1:3])
        drawing = {"matches": draw.draw_matches, "tracks": draw.draw_tracks}[style]
        drawn = drawing(images[..., :3], correspondence, places, frame)
        sheet = draw.contact_sheet(drawn, columns)
        return io.NodeOutput(drawn, sheet, ui=ui.PreviewImage(sheet, cls=cls))


def _parse_points(text: str) -> list[draw.Point]:
    """Return one (x, y) for each line that is not empty."""
    points = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                x, y = (float(part) for part in line.replace(",", " ").split())
            except ValueError as error:
                raise ValueError(f'line {number} of points is "{line}"; expected "x, y", such as "120, 80".') from error
            points.append((x, y))
    return points


NODES = [ShowCorrespondence]
