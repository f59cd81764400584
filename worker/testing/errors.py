"""Why there are no servers for tests.

Exception
├── ServersUnfit     those that were given cannot be used
└── ContainerError   one cannot be started in a container

Of an embedded server it is EmbeddedServerError (worker.embedded).
"""


class ServersUnfit(Exception):
    """The servers that were given cannot be used for tests."""


class ContainerError(Exception):
    """A server cannot be started in a container."""
