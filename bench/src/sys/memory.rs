//! Memory mappings of the self-checking writer.
