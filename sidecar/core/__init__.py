"""Pure decisions and bytes: no await, no I/O, no clock, no logging. Takes bytes and either answers or raises."""
