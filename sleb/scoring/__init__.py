"""Skip sets and sequences -> nats, and what makes that fast."""
