"""The evaluation suite: public recordings of real devices, the peers, the protocol and the report."""
