"""The sparse layer: route, dispatch, compute, combine."""
