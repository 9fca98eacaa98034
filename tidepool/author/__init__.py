"""Commands for authors of flows: `tidepool new`, and for their repository: `tidepool init`, `tidepool update`."""

from typing import Literal

Kind = Literal["plain", "mapped", "batched", "dataframe"]
