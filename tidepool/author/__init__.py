"""Commands for authors of flows: `tidepool new`."""

from typing import Literal

Kind = Literal["plain", "mapped", "batched", "dataframe"]
