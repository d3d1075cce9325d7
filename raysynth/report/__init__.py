"""What people look at: pictures, charts and the self-contained HTML report."""
