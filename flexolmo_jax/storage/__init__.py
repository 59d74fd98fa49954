# SPDX-License-Identifier: Apache-2.0
"""Object storage by URL: what may be named, how it is read, cached, and written."""
