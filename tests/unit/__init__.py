"""Values and texts, and managers beside fakes at their seams: no kernel."""
