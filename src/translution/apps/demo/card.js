// A card: its content is HTML of ours. When that changes the focus stays on the button it was on.
export default {
  template: `<article class="card" ref="card"></article>`,
  props: { content: String },
  watch: { content() { this.fill(); } },
  mounted() { this.fill(); },
  methods: {
    fill() {
      const card = this.$refs.card;
      const at = [...card.querySelectorAll("button")].indexOf(document.activeElement);
      card.innerHTML = this.content || "";
      if (at >= 0) card.querySelectorAll("button")[at]?.focus({ preventScroll: true });
    },
  },
};
