"""image-etl against a real Prefect server and a real Dask cluster."""

from __future__ import annotations

import io
import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, ImageSequence
from prefect import flow
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import ParameterTypeError

from flows.image_etl.flow import download, image_etl
from flows.image_etl.transform import SEPARATOR, default_key
from tests.polling import until
from tidepool import report, storage
from tidepool import settings as settings_module
from tidepool.errors import InputError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from prefect.client.schemas.objects import State, TaskRun

SAMPLE = Path(__file__).parents[2] / "samples" / "image-data.img"

pytestmark = pytest.mark.usefixtures("prefect_server")


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; `/short` breaks off after half of what it announced, `/chunked` announces no length."""

    def do_GET(self) -> None:
        if self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 500)
        elif self.path == "/chunked":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(piece("red"))
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        if self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
        elif self.path == "/chunked":
            self.send_response(200)
            self.end_headers()
        else:
            super().do_HEAD()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server on `tmp_path`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def piece(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, format="GIF")
    return buffer.getvalue()


def run(**parameters: object) -> tuple[State[Any], UUID]:
    state = image_etl(**parameters, return_state=True)
    assert state.state_details.flow_run_id is not None
    return state, state.state_details.flow_run_id


def task_states(run_id: UUID, count: int) -> dict[str, State[Any]]:
    """The final states of a run's tasks by name; the server takes them in later than the run ends."""

    def look() -> dict[str, State[Any]]:
        with get_client(sync_client=True) as client:
            found: list[TaskRun] = client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
            )
        return {task.name: task.state for task in found if task.state and task.state.is_final()}

    return until(look, lambda states: len(states) == count)


def test_the_sample_gives_27_frames_and_is_downloaded_once(storage_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, run_id = run(data_url=str(SAMPLE), frame_duration_ms=150, n_workers=2)

    folder = f"{storage_root}/image_etl/{run_id}"
    frames = [f"{folder}/frame_{index:02}.gif" for index in range(27)]
    gif = f"{folder}/clip.gif"
    assert state.result() == {"gif": gif, "bytes": storage.size(gif), "frames": 27, "bad_frames": []}
    assert storage.listing(folder) == sorted([gif, *frames])
    assert b"".join(storage.read(frame) + SEPARATOR for frame in frames) == SAMPLE.read_bytes()
    with Image.open(io.BytesIO(storage.read(gif))) as animated:
        assert animated.n_frames == 27
        assert animated.size == (500, 375)
        for frame, source in zip(ImageSequence.Iterator(animated), frames, strict=True):
            assert frame.info["duration"] == 150
            with Image.open(io.BytesIO(storage.read(source))) as expected:
                assert frame.convert("RGB").tobytes() == expected.convert("RGB").tobytes(), source

    page = Artifact.get("image-etl-clip")
    assert page is not None
    assert page.flow_run_id == run_id
    assert page.description == f"clip.gif: 27 frames, {storage.size(gif):,} bytes"
    assert "data:image/gif;base64," in str(page.data)
    assert "A small preview" in str(page.data)
    assert len(str(page.data)) <= report.LIMIT_BYTES
    outputs = Artifact.get("image-etl-outputs")
    assert outputs is not None
    assert [row["url"] for row in json.loads(str(outputs.data))] == [gif, *frames]
    first = task_states(run_id, 31)
    (download,) = [state for name, state in first.items() if name.startswith("download ")]
    assert download.name == "Completed"

    monkeypatch.setenv("TIDEPOOL_COMPUTE_PROVIDER", "threads")
    settings_module.settings.cache_clear()
    again, run_id = run(data_url=str(SAMPLE), gif_name="again.gif", n_workers=1)

    assert again.result()["frames"] == 27
    (skipped,) = [state for name, state in task_states(run_id, 31).items() if name.startswith("download ")]
    assert (skipped.name, skipped.is_completed()) == ("Cached", True)
    assert str(skipped.message).startswith("already present: file://")


@pytest.mark.usefixtures("threads")
def test_a_bad_frame_fails_its_task_and_the_run_and_leaves_no_frame(storage_root: str, tmp_path: Path) -> None:
    (tmp_path / "bad.img").write_bytes(SEPARATOR.join([piece("red"), b"this is text, no image", piece("blue")]))

    state, run_id = run(data_url=str(tmp_path / "bad.img"))

    assert state.is_failed()
    with pytest.raises(InputError) as caught:
        state.result()
    sentence = str(caught.value)
    assert sentence.startswith("1 of 3 frames are bad, the first: ")
    assert "frame 1 (bytes " in sentence
    assert "is not an image: 22 bytes that begin with b'this is text, no'" in sentence
    assert sentence.endswith("; allow_bad_frames=true leaves bad frames out")
    states = task_states(run_id, 5)
    assert {name: states[name].is_failed() for name in states if name.startswith("frame")} == {
        "frame_00.gif": False,
        "frame_01.gif": True,
        "frame_02.gif": False,
    }
    assert "frame 1 (bytes " in str(states["frame_01.gif"].message)
    assert storage.listing(f"{storage_root}/image_etl/{run_id}") == []


@pytest.mark.usefixtures("threads")
def test_bad_frames_may_be_left_out(storage_root: str, tmp_path: Path) -> None:
    (tmp_path / "bad.img").write_bytes(SEPARATOR.join([piece("red"), b"x", piece("blue")]))

    state, run_id = run(data_url=str(tmp_path / "bad.img"), allow_bad_frames=True)

    assert state.is_completed()
    assert (state.result()["frames"], state.result()["bad_frames"]) == (2, [1])
    with Image.open(io.BytesIO(storage.read(state.result()["gif"]))) as animated:
        assert animated.n_frames == 2
    assert not storage.exists(f"{storage_root}/image_etl/{run_id}/frame_01.gif")


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "no frame in 0 bytes; frames are separated by four newline bytes"),
        (SEPARATOR * 3, "no frame in 12 bytes"),
        (b"x" + SEPARATOR + b"y", "2 of 2 frames are bad"),
    ],
    ids=["empty", "separators", "all bad"],
)
def test_data_without_any_frame(storage_root: str, tmp_path: Path, data: bytes, sentence: str) -> None:
    (tmp_path / "x.img").write_bytes(data)

    state, run_id = run(data_url=str(tmp_path / "x.img"), allow_bad_frames=True)

    with pytest.raises(InputError, match=sentence):
        state.result()
    assert storage.listing(f"{storage_root}/image_etl/{run_id}") == []


@pytest.mark.usefixtures("threads", "storage_root")
def test_a_source_that_is_absent_fails_at_once(web: str) -> None:
    for source in (f"{web}/gone.img", "gone.img"):
        state, run_id = run(data_url=source)
        with pytest.raises(StorageError, match=r"gone\.img does not exist"):
            state.result()
        assert list(task_states(run_id, 1)) == [f"download {source}"]


def fetch(source: str, data: str) -> State[Any]:
    """The state of a download, retried without delay, in a flow of its own: outside of one there are no logs."""
    states = []

    @flow(name="fetch")
    def fetching() -> None:
        states.append(download.with_options(retry_delay_seconds=0)(source, data, return_state=True))

    fetching()
    return states[0]


@pytest.mark.usefixtures("storage_root")
def test_an_incomplete_copy_is_downloaded_again_and_a_complete_one_is_not(web: str, tmp_path: Path) -> None:
    (tmp_path / "x.img").write_bytes(b"0123456789")
    storage.write("data/x.img", b"01234")

    assert fetch(f"{web}/x.img", "data/x.img").name == "Completed"
    assert storage.read("data/x.img") == b"0123456789"
    assert fetch(f"{web}/x.img", "data/x.img").name == "Cached"


@pytest.mark.usefixtures("storage_root")
def test_a_download_that_breaks_off_leaves_nothing(web: str) -> None:
    state = fetch(f"{web}/short", "data/x.img")

    assert state.is_failed()
    assert storage.listing("data") == []


@pytest.mark.usefixtures("storage_root")
def test_a_server_that_does_not_report_a_size(web: str) -> None:
    assert fetch(f"{web}/chunked", "data/x.img").name == "Completed"
    assert storage.read("data/x.img") == piece("red")
    assert fetch(f"{web}/chunked", "data/x.img").name == "Cached"


@pytest.mark.usefixtures("storage_root")
def test_stored_data_is_used_while_its_source_is_unreachable() -> None:
    away = "http://127.0.0.1:9/x.img"
    assert fetch(away, "data/x.img").is_failed()
    storage.write("data/x.img", b"0123")
    assert fetch(away, "data/x.img").name == "Cached"


@pytest.mark.usefixtures("threads")
def test_the_key_is_given_or_derived_from_the_url(storage_root: str, tmp_path: Path) -> None:
    (tmp_path / "x.img").write_bytes(piece("red"))
    url = f"file://{tmp_path}/x.img"

    run(data_url=url, data_file="mine/x.img", gif_name="a.gif")
    run(data_url=url, gif_name="a.gif")

    assert storage.exists(f"{storage_root}/mine/x.img")
    assert storage.exists(f"{storage_root}/{default_key(url)}")


@pytest.mark.parametrize(
    "parameters",
    [{"gif_name": "../x.gif"}, {"gif_name": "x.png"}, {"frame_duration_ms": 0}, {"n_workers": 0}, {"data_url": ""}],
)
def test_a_parameter_out_of_bounds_is_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ParameterTypeError, match=next(iter(parameters))):
        image_etl.validate_parameters(parameters)
