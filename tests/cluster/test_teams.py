"""A second team on the same platform: its runs, its work pool, its store."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from installed import Platform


def test_a_run_of_the_second_team_stays_in_its_namespace(platform: Platform, media: Platform) -> None:
    deployment = media.copy("image-etl/image-etl", "media", tags=["managed-by:media", "owner:media"])
    run_id = media.start(deployment, n_workers=2)
    owned = f"prefect.io/flow-run-id={run_id}"
    media.until(lambda: media.runs.get("daskclusters"), "its Dask cluster exists", 180)
    assert not platform.runs.get("daskclusters")
    run = media.wait(run_id)
    assert run["state_type"] == "COMPLETED", f"{run['state']}\n{media.logs(run_id)}\n{media.namespace.report()}"
    assert len(media.runs.get("jobs", owned)) == 1
    assert not platform.runs.get("jobs", owned)
    assert run["work_pool_name"] == "media"
    media.until(lambda: not media.runs.dask(), "no Dask object is left", 60)
    stored = media.namespace.kubectl("exec", "deployment/store-media", "--", "ls", "/tmp/buckets/tidepool")
    assert stored.strip(), "its outputs are in its own store"
