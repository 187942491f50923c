"""`tidegate simulate` and `tidegate plan`: the policy that runs live, on a recorded trace and a virtual clock."""

from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.output import Format, Output, Problem, show

Trace = Annotated[Path, typer.Option(help="CSV, CSV.gz or Parquet: t_s,endpoint,input_tokens,output_tokens")]
Fleet = Annotated[Path | None, typer.Option(help="fleet and model profiles (TOML)")]
