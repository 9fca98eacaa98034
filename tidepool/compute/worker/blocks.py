"""Finds Prefect's own blocks without loading every integration that is installed."""

from __future__ import annotations

from functools import cache
from typing import Any

from prefect.blocks.core import Block
from prefect.utilities.dispatch import lookup_type


@cache
def known_blocks_first() -> None:
    """Lets Prefect look for a block's class among those that are loaded before it imports all integrations.

    A flow run's context holds its result storage, which is a block. To read it, Prefect imports what is installed of
    prefect-kubernetes, prefect-docker, …: 1,500 modules and seconds in each Dask worker, for a class of Prefect itself.
    """
    prefects: Any = Block.get_block_class_from_key
    load_and_find = prefects.__func__

    def find(cls: type[Block], key: str) -> type[Block]:
        try:
            return lookup_type(cls, key)
        except KeyError:
            found: type[Block] = load_and_find(cls, key)
            return found

    Block.get_block_class_from_key = classmethod(find)  # type: ignore[assignment] # bound when it is looked up
