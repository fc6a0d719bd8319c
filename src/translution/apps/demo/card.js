// A card: its content is HTML of ours. When that changes, what has the focus keeps it, and details stay
// as open as they were. They begin open on a wide screen; on a
// smaller one the predictions of all models are seen at once.
export default {
  template: `<article class="card" ref="card"></article>`,
  props: { content: String },
  watch: { content() { this.fill(); } },
  created() { this.open = matchMedia("(min-width: 1200px)").matches; },
  mounted() { this.fill(); },
  methods: {
    fill() {
      const card = this.$refs.card;
      const controls = () => [...card.querySelectorAll("summary, button")];
      const details = () => card.querySelector("details");
      const at = controls().indexOf(document.activeElement);
      this.open = details()?.open ?? this.open;
      card.innerHTML = this.content || "";
      if (details()) details().open = this.open;
      if (at >= 0) controls()[at]?.focus({ preventScroll: true });
    },
  },
};
