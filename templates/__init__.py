"""The C++ of the hosts: headers, and Jinja2 templates of what depends on a spec."""
