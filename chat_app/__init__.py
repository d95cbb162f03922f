"""What people see: pages, HTTP routes, commands, and the engines that answer."""
