# SPDX-License-Identifier: Apache-2.0
"""Independent re-implementations that the package is compared with."""
