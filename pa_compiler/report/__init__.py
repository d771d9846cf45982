"""The page that shows a module: its stages side by side, what bounds it, and what a call of it does. Without TVM."""
