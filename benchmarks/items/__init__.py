"""One subject each: a function `measure` from a `Plan` to an `Item`."""
