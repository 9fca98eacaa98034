"""Commands for authors of flows: `tidepool new`, and for their repository: `tidepool init`, `update` and `chart`."""

from typing import Literal

Kind = Literal["plain", "mapped", "batched", "dataframe"]
