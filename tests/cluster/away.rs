//! Nodes whose Redis is killed, frozen, emptied or slow.
