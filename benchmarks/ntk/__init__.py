"""The tangent kernel beside another library's."""
