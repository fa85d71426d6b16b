"""How texts are written: settings, the readable loop, requests that share an engine."""
