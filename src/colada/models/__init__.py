"""Who writes: Cola DLM and the models it is compared with."""
