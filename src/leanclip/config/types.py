"""The kinds of numbers that settings may be."""

from typing import Annotated

from pydantic import Field

Positive = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(gt=0, le=100_000_000)]  # of a model
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running mean; 1 would never take anything in
Ratio = Annotated[float, Field(gt=0, le=100)]
