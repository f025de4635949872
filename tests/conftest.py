"""Every test runs on the CPU, as eight virtual devices; both are fixed when JAX is first imported, so this comes first.

Tests that need one device say so: `DataParallel(1)`.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
